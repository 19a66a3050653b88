# SPDX-License-Identifier: Apache-2.0
"""Makes the helpers of this directory importable (tests have no packages)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
