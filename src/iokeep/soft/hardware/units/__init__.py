# SPDX-License-Identifier: Apache-2.0
"""IOMMUs of the platform, one module per kind: registers, commands, and the way to a page table."""
