# SPDX-License-Identifier: Apache-2.0
"""What ``runs`` takes a table for: something else, one run of leaves, nothing but zeroes, single pages."""

OTHER, RUN, EMPTY, PAGES = 0, 1, 2, 3
