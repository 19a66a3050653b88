# SPDX-License-Identifier: Apache-2.0
"""Shared settings: no Hypothesis deadline, since compiling would break it; failures say how to replay.

With ``IOKEEP_EXAMPLES=fixed`` (``.ci/run``) the examples follow from the code alone, so that one tree has one
verdict; every other run draws new ones.
"""

import os

from hypothesis import settings

settings.register_profile("iokeep", deadline=None, print_blob=True)
settings.register_profile("fixed", settings.get_profile("iokeep"), derandomize=True)
settings.load_profile("fixed" if os.environ.get("IOKEEP_EXAMPLES") == "fixed" else "iokeep")
