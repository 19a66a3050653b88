# SPDX-License-Identifier: Apache-2.0
"""Client library for /dev/liveupdate."""
