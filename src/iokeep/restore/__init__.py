# SPDX-License-Identifier: Apache-2.0
"""Plan, replay, validate and adopt, on any transport."""
