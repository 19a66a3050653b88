# SPDX-License-Identifier: Apache-2.0
"""The engine against its peers in one run: memory speed, C per page and per table, NumPy."""
