# SPDX-License-Identifier: Apache-2.0
"""The way from an IOMMU's register to the root of a page table: root, context and PASID entries."""
