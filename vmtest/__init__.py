# SPDX-License-Identifier: Apache-2.0
"""iokeep on a real kernel: Debian's newest Linux, built small, booted in QEMU. See README.md."""
