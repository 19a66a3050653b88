# SPDX-License-Identifier: Apache-2.0
"""What crosses the kexec: FDT, preserved-page tree, LUO, memfd and iommu records."""
