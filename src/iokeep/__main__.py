# SPDX-License-Identifier: Apache-2.0
"""``python -m iokeep`` is the command line."""

from iokeep.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
