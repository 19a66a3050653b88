# SPDX-License-Identifier: Apache-2.0
"""The software kernel: frames, files, iommufd, LUO, adoption, boot."""
