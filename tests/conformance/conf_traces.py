# SPDX-License-Identifier: Apache-2.0
"""Random traces of iommufd operations: made from a seed, run on a machine, checked, shrunk when they fail.

A trace is a list of operations, each a list of plain values, so that it can be written down as JSON and run
again. Operations name objects by position ("the third IOAS that is there"), so that a trace stays one when
operations are taken out.

Two judges. :class:`Shadow` is a model of areas that believes what a machine answers and knows what cannot be:
an overlap that succeeds, a copy of a hole, bytes that do not add up, a page that is not the one that was
mapped. And two machines must give the same answers, number for number.
"""

import random
from dataclasses import dataclass, field

import conf_trace_objects
from conf_env import FIXED, HUGE, PAGE, RW, ULONG_MAX, Env, R, W, outcome
from conf_rows import ABSENT, BASE
from conf_trace_access import AccessSteps, Impossible
from conf_trace_access import makers as access_makers
from conf_trace_access import opening as access_opening

#: bytes of each memfd; the last is mapped as user memory only, in a window from a huge page's border on
FILE_BYTES = (2 * HUGE, 2 * HUGE, 4 * HUGE)
USER = 2
DEVICES = 3
#: what IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT begins with
MEMORY_LIMIT = 65536
#: what every trace of a kind ends with
LAST = {"mock": [["check"], ["pins"]], "objects": conf_trace_objects.LAST}
#: IOVAs that every IOMMU here reaches: 47 bits
WIDTH = (1 << 47) - 1


def generate(seed, length, kind):
    """The trace of a seed. ``kind``: "mock", "vfio" or None: what devices there are; "objects": with mock
    devices, of objects' lives and not of areas.
    """
    if kind == "objects":
        return conf_trace_objects.generate(seed, length)
    rng = random.Random(seed)
    trace = [["ioas"]]
    if kind == "mock" and not rng.randrange(3):
        trace.append(["memory_limit", rng.choice([12, 16, 64])])
    if kind == "mock" and rng.randrange(2):
        trace += access_opening(rng, BASE)
    makers = [
        (4, lambda: ["ioas"]),
        (14, lambda: ["map_file", obj(rng), rng.randrange(2), offset(rng), size(rng), place(rng), prot(rng)]),
        (6, lambda: ["map", obj(rng), offset(rng) % HUGE, size(rng), place(rng), prot(rng)]),
        (8, lambda: ["copy", obj(rng), obj(rng), iova(rng), size(rng), place(rng), prot(rng)]),
        (9, lambda: ["unmap", obj(rng), iova(rng), size(rng) * rng.choice([1, 1, 1, 4, 64])]),
        (3, lambda: ["unmap_area", obj(rng), rng.randrange(8)]),
        (1, lambda: ["unmap_all", obj(rng)]),
        (2, lambda: ["allow", obj(rng), [spread(rng) for _ in range(rng.randrange(3))]]),
        (3, lambda: ["ranges", obj(rng)]),
        (2, lambda: ["huge_pages", obj(rng), rng.choice([None, 0, 1])]),
        (2, lambda: ["destroy", rng.randrange(24)]),
        (1, lambda: ["change_process"]),
    ]
    if kind:
        makers += [
            (7, lambda: ["attach", rng.randrange(DEVICES), obj(rng)]),
            (3, lambda: ["detach", rng.randrange(DEVICES)]),
            (5, lambda: ["hwpt", rng.randrange(DEVICES), obj(rng)]),
            (4, lambda: ["attach_hwpt", rng.randrange(DEVICES), rng.randrange(6)]),
            (3, lambda: ["destroy_hwpt", rng.randrange(6)]),
        ]
    if kind == "mock":
        makers += [
            (4, lambda: ["check"]),
            (1, lambda: ["reserve", obj(rng), iova(rng), size(rng)]),
            *access_makers(rng, obj, iova, size),
        ]
    weights = [weight for weight, _ in makers]
    for _ in range(length):
        trace.append(rng.choices(makers, weights)[0][1]())
    return trace


def obj(rng):
    return rng.randrange(4)


def offset(rng):
    return rng.choice([0, 0, PAGE, 2048, 512, HUGE, rng.randrange(512) * PAGE, rng.randrange(HUGE)])


def size(rng):
    pages = rng.choice([1, 1, 2, 3, rng.randrange(1, 20), 512, 513])
    return pages * PAGE + rng.choice([0] * 12 + [2048, 1, -1, 512])


def iova(rng):
    odd = [2048, 512, 1, PAGE - 1]
    return BASE + rng.choice([rng.randrange(24), rng.randrange(500, 530)]) * PAGE + rng.choice([0] * 16 + odd)


def place(rng):
    """Where a mapping goes: an IOVA, or None: the kernel chooses."""
    rare = [None, None, None, None, 0, 0xFEE00000, (1 << 31) - PAGE, (1 << 47) - PAGE]
    return rng.choice(rare) if rng.random() < 0.35 else iova(rng)


def prot(rng):
    return rng.choice([RW, RW, RW, R, W])


def spread(rng):
    start = iova(rng)
    return [start, start + rng.choice([1, 16, 600]) * PAGE - 1]


@dataclass
class Area:
    """What is mapped: [iova, iova + length) shows bytes of a file from ``start`` on.

    :param writable: its pages were mapped to be written, so that copies may be. :param flags: R, W of itself.
    """

    iova: int
    length: int
    file: int
    start: int
    writable: bool
    flags: int = RW

    @property
    def last(self):
        return self.iova + self.length - 1


@dataclass
class Shadow:
    """The areas of each IOAS as the answers tell; ``hwpts``: id -> IOAS id."""

    areas: dict = field(default_factory=dict)
    hwpts: dict = field(default_factory=dict)

    def touching(self, ioas, start, last):
        return [a for a in self.areas[ioas] if a.iova <= last and a.last >= start]

    def mapped(self, ioas, pieces):
        """A map or copy succeeded."""
        for piece in pieces:
            if found := self.touching(ioas, piece.iova, piece.last):
                raise Impossible(f"IOAS {ioas}: {piece} over {found[0]}")
            self.areas[ioas].append(piece)

    def source(self, ioas, iova, length):
        """The pieces of areas that [iova, iova + length) shows, at offset 0; None with a hole."""
        out, at, last = [], iova, iova + length - 1
        while at <= last:
            hit = self.touching(ioas, at, at)
            if not hit:
                return None
            n = min(last, hit[0].last) - at + 1
            start = hit[0].start + at - hit[0].iova
            out.append(Area(at - iova, n, hit[0].file, start, hit[0].writable, hit[0].flags))
            at += n
        return out

    def unmap(self, ioas, start, last, answer):
        """What an unmap that answered so has removed."""
        touching = sorted(self.touching(ioas, start, last), key=lambda a: a.iova)
        cut = next((i for i, a in enumerate(touching) if a.iova < start or a.last > last), len(touching))
        if isinstance(answer, int):
            if cut < len(touching):
                raise Impossible(f"unmap of {start:#x} ... {last:#x} cut {touching[cut]}")
            if answer != sum(a.length for a in touching):
                raise Impossible(f"unmap of {start:#x} ... {last:#x} says {answer:#x} bytes")
        elif answer != "ENOENT":
            return
        elif cut == len(touching) and touching:
            raise Impossible(f"unmap of {start:#x} ... {last:#x}: ENOENT with {touching[0]} there")
        # areas before one that is only partly inside are gone
        for area in touching[:cut]:
            self.areas[ioas].remove(area)


class Run(AccessSteps):
    """A trace on its way through a machine. ``answers``: one for each operation."""

    def __init__(self, machine, kind):
        self.env = Env(machine)
        self.kind = kind
        self.machine = machine
        self.answers = []
        self.shadow = Shadow()
        self.hwpts = []
        self.devices = [None] * DEVICES
        self.accesses = []
        self.wrote = 0
        self.limited = False
        env = self.env
        try:
            self.iommufd = env.iommu()
            self.files = [env.memfd(size) for size in FILE_BYTES]
            self.maps = [env.mmap(*each) for each in zip(self.files, FILE_BYTES, strict=True)]
        except BaseException:
            env.__exit__()
            raise
        # a place of that mapping that is aligned as a huge page is, on every machine
        self.window = -(-self.maps[USER].hva // HUGE) * HUGE - self.maps[USER].hva

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.limited:
            self.env.memory_limit(self.env.iommu(), MEMORY_LIMIT)
        self.env.__exit__()

    @staticmethod
    def fits(piece):
        """Whether a piece of an area lies in its file."""
        return piece.start + piece.length <= FILE_BYTES[piece.file]

    def ioas(self, number):
        ids = sorted(self.shadow.areas)
        return ids[number % len(ids)] if ids else ABSENT

    def hwpt(self, number):
        return self.hwpts[number % len(self.hwpts)] if self.hwpts else ABSENT

    def step(self, operation):
        """Run one operation; its answer."""
        name, *args = operation
        answer = getattr(self, f"do_{name}")(*args)
        self.answers.append(answer)
        return answer

    # ---- IOAS

    def do_ioas(self):
        answer = outcome(self.env.ioas, self.iommufd)
        if isinstance(answer, int):
            self.shadow.areas[answer] = []
        return answer

    def do_memory_limit(self, limit):
        """The kernel goes through pages in batches of as few as one."""
        self.limited = True
        return outcome(self.env.memory_limit, self.iommufd, limit)

    def do_map_file(self, number, file, start, length, at, flags):
        ioas = self.ioas(number)
        answer = outcome(self.env.map_file, self.iommufd, ioas, self.files[file], start, length, at, flags)
        return self._mapped(ioas, answer, at, [Area(0, length, file, start, bool(flags & W))], flags)

    def do_map(self, number, start, length, at, flags):
        ioas = self.ioas(number)
        start += self.window
        hva = self.maps[USER].hva + start
        answer = outcome(self.env.map, self.iommufd, ioas, hva, length, at, flags)
        return self._mapped(ioas, answer, at, [Area(0, length, USER, start, bool(flags & W))], flags)

    def do_copy(self, to, number, source, length, at, flags):
        target, ioas = self.ioas(to), self.ioas(number)
        answer = outcome(self.env.copy, self.iommufd, target, ioas, source, length, at, flags)
        if isinstance(answer, str):
            return answer
        pieces = self.shadow.source(ioas, source, length)
        if pieces is None:
            raise Impossible(f"copy of a hole: {source:#x} + {length:#x}")
        if flags & W and not all(piece.writable for piece in pieces):
            raise Impossible("a writable copy of read-only pages")
        return self._mapped(target, answer, at, pieces, flags)

    def _mapped(self, ioas, answer, at, pieces, flags):
        if isinstance(answer, str):
            return answer
        if at is not None and answer != at:
            raise Impossible(f"asked for {at:#x}, got {answer:#x}")
        if at is None and not answer:
            raise Impossible("an automatic IOVA of 0")
        self.shadow.mapped(
            ioas, [Area(answer + p.iova, p.length, p.file, p.start, p.writable, flags) for p in pieces]
        )
        return answer

    def do_unmap(self, number, start, length):
        ioas = self.ioas(number)
        answer = outcome(self.env.unmap, self.iommufd, ioas, start, length)
        if ioas != ABSENT and length:
            self.shadow.unmap(ioas, start, start + length - 1, answer)
        return answer

    def do_unmap_area(self, number, which):
        """One that is there, wholly."""
        ioas = self.ioas(number)
        areas = sorted(self.shadow.areas.get(ioas, []), key=lambda a: a.iova)
        if not areas:
            return self.do_unmap(number, BASE, PAGE)
        area = areas[which % len(areas)]
        return self.do_unmap(number, area.iova, area.length)

    def do_unmap_all(self, number):
        ioas = self.ioas(number)
        answer = outcome(self.env.unmap, self.iommufd, ioas)
        if ioas != ABSENT:
            self.shadow.unmap(ioas, 0, ULONG_MAX, answer)
        return answer

    def do_allow(self, number, ranges):
        return outcome(self.env.allow, self.iommufd, self.ioas(number), ranges)

    def do_ranges(self, number):
        answer = outcome(self.env.ranges, self.iommufd, self.ioas(number))
        if self.kind != "vfio" or isinstance(answer, str):
            return answer
        # how far an IOMMU reaches is a matter of its hardware
        ranges = [(start, min(last, WIDTH)) for start, last in answer[0] if start <= WIDTH]
        return ranges, answer[1]

    def do_huge_pages(self, number, value):
        return outcome(self.env.huge_pages, self.iommufd, self.ioas(number), value)

    def do_change_process(self):
        return "done" if outcome(self._change) is None else "refused"

    def _change(self):
        self.env.call(self.iommufd, "IOMMU_IOAS_CHANGE_PROCESS")

    def do_reserve(self, number, start, length):
        return outcome(self.env.add_reserved, self.iommufd, self.ioas(number), start, length)

    def do_destroy(self, number):
        """Any id: an IOAS with its areas, an HWPT, a device."""
        stdevs = {device[0] for device in self.devices if device and self.kind == "mock"}
        if number in stdevs:
            return self.do_detach(next(i for i, d in enumerate(self.devices) if d and d[0] == number))
        answer = outcome(self.env.destroy, self.iommufd, number)
        if answer is None:
            self.shadow.areas.pop(number, None)
            self._forget(number)
        return answer

    # ---- devices

    def do_attach(self, index, number):
        return self._attach(index, self.ioas(number))

    def do_attach_hwpt(self, index, number):
        return self._attach(index, self.hwpt(number))

    def _attach(self, index, pt):
        if self.kind == "vfio":
            return self._attach_vfio(pt)
        device = self.devices[index]
        if device is None:
            answer = outcome(self.env.mock, self.iommufd, pt)
            if isinstance(answer, tuple):
                stdev, hwpt, dev = answer
                self.devices[index] = [stdev, dev]
                self._shown(index, hwpt, pt)
            return answer
        answer = outcome(self.env.mock_replace, self.iommufd, device[0], pt)
        if isinstance(answer, int):
            self._shown(index, answer, pt)
        return answer

    def _attach_vfio(self, pt):
        """There is one device; it is bound when it is first needed."""
        device = self.devices[0]
        if device is None:
            fd = self.env.open(self.machine.vfio[0])
            dev = self.env.call(fd, "VFIO_DEVICE_BIND_IOMMUFD", argsz=16, iommufd=self.iommufd).out_devid
            self.devices[0] = device = [fd, dev]
        answer = outcome(self.env.call, device[0], "VFIO_DEVICE_ATTACH_IOMMUFD_PT", argsz=12, pt_id=pt)
        if isinstance(answer, str):
            return answer
        self._shown(0, answer.pt_id, pt)
        return answer.pt_id

    def _shown(self, index, hwpt, pt):
        """A device is on an HWPT; the one before may be gone."""
        old = self.devices[index][2:]
        self.devices[index][2:] = [hwpt]
        if hwpt not in self.shadow.hwpts:
            self.shadow.hwpts[hwpt] = pt
        if old and old[0] != hwpt:
            self._gone(old[0])

    def _gone(self, hwpt):
        """No device is there any more: an automatic HWPT went."""
        if hwpt not in self.hwpts and not any(d and d[2:] == [hwpt] for d in self.devices):
            self.shadow.hwpts.pop(hwpt, None)

    def _forget(self, hwpt):
        self.shadow.hwpts.pop(hwpt, None)
        if hwpt in self.hwpts:
            self.hwpts.remove(hwpt)

    def do_detach(self, index):
        index = 0 if self.kind == "vfio" else index
        device = self.devices[index]
        if device is None:
            return "no device"
        if self.kind == "vfio":
            self.env.call(device[0], "VFIO_DEVICE_DETACH_IOMMUFD_PT", argsz=8)
        else:
            self.env.destroy(self.iommufd, device[0])
            self.devices[index] = None
        old = device[2:]
        device[2:] = []
        if old:
            self._gone(old[0])
        return "detached"

    def do_hwpt(self, index, number):
        device = self.devices[0 if self.kind == "vfio" else index]
        ioas = self.ioas(number)
        answer = outcome(self.env.hwpt, self.iommufd, device[1] if device else ABSENT, ioas)
        if isinstance(answer, int):
            self.hwpts.append(answer)
            self.shadow.hwpts[answer] = ioas
        return answer

    def do_destroy_hwpt(self, number):
        hwpt = self.hwpt(number)
        answer = outcome(self.env.destroy, self.iommufd, hwpt)
        if answer is None:
            self._forget(hwpt)
        return answer

    # ---- what is mapped

    def do_check(self):
        """Every mock HWPT shows every area of its IOAS, page by page, and nothing right behind it."""
        for hwpt, ioas in self.shadow.hwpts.items():
            for area in self.shadow.areas[ioas]:
                hva = self.maps[area.file].hva + area.start
                if not self.env.check_map(self.iommufd, hwpt, area.iova, area.length, hva):
                    raise Impossible(f"HWPT {hwpt} does not show {area}")
                behind = area.last + 1
                if not self.shadow.touching(ioas, behind, behind + 2047) and self.env.check_map(
                    self.iommufd, hwpt, behind, 2048, hva
                ):
                    raise Impossible(f"HWPT {hwpt} shows something at {behind:#x}, behind {area}")
        return len(self.shadow.hwpts)

    def do_pins(self):
        return self.pins()


def whole(trace, kind):
    """A trace with its end."""
    return [*trace, *LAST.get(kind, [])]


def run(machine, trace, kind):
    """Run a whole trace: (answers, what was impossible or None)."""
    before = machine.warnings()
    with conf_trace_objects.ObjectRun(machine) if kind == "objects" else Run(machine, kind) as running:
        try:
            for operation in whole(trace, kind):
                running.step(operation)
        except Impossible as error:
            return running.answers, f"{operation}: {error}"
        answers = running.answers
    if machine.warnings() != before:
        return answers, "the kernel warned: see its log"
    return answers, None


def difference(trace, one, other):
    """The first operation that was answered otherwise, as text; None: there is none."""
    for operation, a, b in zip(trace, one, other, strict=False):
        if a != b:
            return f"{operation}: {a} here, {b} there"
    return None if len(one) == len(other) else f"{len(one)} answers here, {len(other)} there"


def judge(machine, trace, kind, other=None):
    """What is wrong with a trace on a machine, and against another one; None: nothing."""
    answers, wrong = run(machine, trace, kind)
    if wrong or other is None:
        return wrong
    beside, wrong = run(other, trace, kind)
    return f"on the other machine: {wrong}" if wrong else difference(whole(trace, kind), answers, beside)


def shrink(trace, fails):
    """The trace with as much taken out as it goes while ``fails`` still says something."""
    chunk = max(1, len(trace) // 2)
    while chunk:
        at = 0
        while at < len(trace):
            shorter = trace[:at] + trace[at + chunk :]
            if shorter and fails(shorter):
                trace = shorter
            else:
                at += chunk
        chunk //= 2
    return trace


__all__ = ["FIXED", "Impossible", "Run", "difference", "generate", "judge", "run", "shrink"]
