# SPDX-License-Identifier: Apache-2.0
"""Page-table formats, one file each; nothing else in the project knows a PTE bit."""
