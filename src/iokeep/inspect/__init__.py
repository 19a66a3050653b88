# SPDX-License-Identifier: Apache-2.0
"""Looks at a host and at processes, changing nothing: what would carry a live update, and what would not."""
