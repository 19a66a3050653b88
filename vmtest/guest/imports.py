# SPDX-License-Identifier: Apache-2.0
"""What the programs for a kernel with VFIO's older interface import: whoever imports this has it compiled."""

from __future__ import annotations

import vmtest.guest.edu
import vmtest.guest.inside
import vmtest.guest.layouts
import vmtest.guest.talk
import vmtest.guest.truth
import vmtest.guest.type1  # noqa: F401
