# SPDX-License-Identifier: Apache-2.0
"""IO page tables: formats stated as data, under one engine."""
