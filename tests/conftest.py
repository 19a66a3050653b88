# SPDX-License-Identifier: Apache-2.0
"""Shared settings: no Hypothesis deadline, since compiling would break it; failures say how to replay."""

from hypothesis import settings

settings.register_profile("iokeep", deadline=None, print_blob=True)
settings.load_profile("iokeep")
