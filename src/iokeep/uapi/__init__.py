# SPDX-License-Identifier: Apache-2.0
"""The kernel's ABI: generated ctypes structures, ioctl numbers, transports, probing."""
