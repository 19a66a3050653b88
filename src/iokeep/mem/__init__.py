# SPDX-License-Identifier: Apache-2.0
"""Physical memory by address: software RAM, captures."""
