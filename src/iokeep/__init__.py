# SPDX-License-Identifier: Apache-2.0
"""Live update for iommufd: carry IO address spaces over a kexec, and prove them equal afterwards."""

__version__ = "0.1.0"
