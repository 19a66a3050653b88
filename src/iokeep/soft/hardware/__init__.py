# SPDX-License-Identifier: Apache-2.0
"""Hardware of the software host: registers, IOMMU, DMA engines."""
