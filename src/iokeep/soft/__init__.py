# SPDX-License-Identifier: Apache-2.0
"""The software host: hardware, kernel, and kexec between two kernels."""
