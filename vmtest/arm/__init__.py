# SPDX-License-Identifier: Apache-2.0
"""A stock Debian arm64 kernel behind an SMMUv3, in QEMU. ``make test-vm-arm`` runs it."""
