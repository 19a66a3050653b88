# SPDX-License-Identifier: Apache-2.0
"""What the software kernel answers to the random traces, written down for a run on a slow machine.

``python conf_answers.py IOMMU MODE COUNT SEED LENGTH`` prints JSON: {"kind": {"seed": answers}}. A run with
IOKEEP_ANSWERS=FILE compares with it, and needs no software machine beside the kernel but to shrink a failure.
"""

import json
import sys

from conf_machine import SoftMachine
from conf_traces import generate, run

KINDS = (None, "mock", "objects", "vfio")


def plain(answers):
    """Answers as they come back out of JSON."""
    return json.loads(json.dumps(answers))


def main(iommu, mode, *numbers):
    count, seed, length = map(int, numbers)
    machine = SoftMachine(iommu, mode)
    out = {}
    for kind in KINDS:
        for each in range(seed, seed + count):
            answers, wrong = run(machine, generate(each, length, kind), kind)
            if wrong:
                raise SystemExit(f"the software kernel, {kind}, trace {each}: {wrong}")
            out.setdefault(str(kind), {})[str(each)] = answers
    machine.close()
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
