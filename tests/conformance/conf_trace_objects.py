# SPDX-License-Identifier: Apache-2.0
"""Random traces of objects' lives: HWPTs, nested ones, vIOMMUs, queues and mock devices, made and destroyed
in any order (see conf_traces.py, which these are run like).

The judge is a model of who uses whom: what is used is busy, all else goes. On what is read from queues, and
what the rest is answered with, two machines must agree.
"""

import random
from dataclasses import dataclass, field

from conf_env import FAULT, FOR_PASIDS, NEST, PAGE, Env, outcome, uapi
from conf_rows import ABSENT, BASE
from conf_selftest import (
    IOMMU_HW_QUEUE_TYPE_SELFTEST,
    IOMMU_HWPT_INVALIDATE_DATA_SELFTEST,
    IOMMU_TEST_OP_PASID_ATTACH,
    IOMMU_TEST_OP_PASID_DETACH,
    IOMMU_TEST_OP_PASID_REPLACE,
    IOMMU_TEST_OP_TRIGGER_IOPF,
    IOMMU_TEST_OP_TRIGGER_VEVENT,
    IOMMU_VEVENTQ_TYPE_SELFTEST,
    IOMMU_VIOMMU_TYPE_SELFTEST,
    MOCK_FLAGS_DEVICE_NO_DIRTY,
    MOCK_FLAGS_DEVICE_PASID,
    iommu_hwpt_invalidate_selftest,
    iommu_hwpt_selftest,
)
from conf_trace_access import Impossible

DEVICES = 3
#: the PASID of each device that is attached and detached
PASID = 7
#: what a trace ends with: every object is destroyed by its number, again and again until nothing is left
LAST = [["destroy_all"]]


def generate(seed, length):
    """The trace of a seed. An object is named by what it should be ("any": no matter) and a position among
    these.
    """
    rng = random.Random(seed)

    def one(*kinds):
        return [rng.choice([*kinds * 4, "any"]), rng.randrange(24)]

    def dev():
        return rng.randrange(DEVICES)

    def flags(*more):
        return rng.choice([0, FOR_PASIDS, FOR_PASIDS, FAULT, FAULT | FOR_PASIDS, *more])

    makers = [
        (1, lambda: ["ioas"]),
        (4, lambda: ["device", one("ioas", "hwpt", "nested")]),
        (2, lambda: ["gone", dev()]),
        (6, lambda: ["hwpt", dev(), one("ioas"), flags(NEST, NEST, NEST, NEST | FOR_PASIDS), one("faults")]),
        (9, lambda: ["hwpt", dev(), one("parent", "viommu"), flags(), one("faults")]),
        (5, lambda: ["viommu", dev(), one("parent")]),
        (8, lambda: ["vdevice", dev(), one("viommu"), rng.randrange(3)]),
        (3, lambda: ["faults"]),
        (6, lambda: ["events", one("viommu"), rng.randrange(1, 3)]),
        (5, lambda: ["hw_queue", one("viommu"), rng.choice([0, 0, 0, 1, 1, 2])]),
        (2, lambda: ["unmap", one("ioas")]),
        (2, lambda: ["map", one("ioas")]),
        (2, lambda: ["close", rng.randrange(6)]),
        (16, lambda: ["replace", dev(), one("ioas", "hwpt", "nested", "nested")]),
        (6, lambda: ["pasid", rng.randrange(3), dev(), one("hwpt", "nested")]),
        (6, lambda: ["fault", dev(), rng.choice([0, 0, PASID, 1])]),
        (6, lambda: ["event", dev()]),
        (7, lambda: ["read", rng.randrange(6), rng.choice([240, 240, 240, 40, 80, 24, 12, 8, 0])]),
        (3, lambda: ["answer", rng.randrange(6), rng.randrange(1, 4), rng.randrange(3)]),
        (3, lambda: ["invalidate", one("nested", "viommu")]),
        (14, lambda: ["destroy", one("nested", "viommu", "parent", "vdevice", "events", "faults", "hw")]),
    ]
    weights = [weight for weight, _ in makers]
    begin = [["ioas"], ["device", ["ioas", 0]], ["hwpt", 0, ["ioas", 0], NEST, ["any", 0]], ["faults"]]
    if rng.randrange(3):
        begin += [
            ["viommu", 0, ["parent", 0]],
            ["vdevice", 0, ["viommu", 0], 1],
            ["events", ["viommu", 0], 2],
        ]
    return begin + [rng.choices(makers, weights)[0][1]() for _ in range(length)]


@dataclass
class Thing:
    """An object: what it is, and which others it uses. ``auto``: an HWPT that goes with its last device."""

    kind: str
    uses: set = field(default_factory=set)
    auto: bool = False


@dataclass
class Device:
    """A mock device: its selftest object, its id, what it and its PASID are on, what a guest knows it as."""

    stdev: int
    dev: int
    on: int
    pasid: int | None = None
    vdevice: int | None = None


class ObjectRun:
    """A trace on its way through a machine. ``answers``: one for each operation."""

    def __init__(self, machine):
        self.env = Env(machine)
        self.answers = []
        #: id -> Thing, but for devices
        self.things = {}
        self.devices = [None] * DEVICES
        #: vIOMMU -> the hardware queue that the next one needs, which is the last that was made with index 0
        self.first_queues = {}
        #: [id, descriptor] of queues; None once it is closed
        self.queues = []
        try:
            self.iommufd = self.env.iommu()
            self.file = self.env.memfd(PAGE)
        except BaseException:
            self.env.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for device in filter(None, self.devices):
            self._leave_pasid(device)
        self.env.__exit__()

    def step(self, operation):
        """Run one operation; its answer."""
        name, *args = operation
        answer = getattr(self, f"do_{name}")(*args)
        self.answers.append(answer)
        return answer

    # ---- who is there

    def ids(self):
        """The numbers of all objects."""
        devices = [each for device in self.devices if device for each in (device.stdev, device.dev)]
        return sorted([*self.things, *devices])

    def one(self, named):
        """The number of the object that is meant: one of its kind, where there is one."""
        kind, number = named
        ids = [each for each in sorted(self.things) if self.things[each].kind == kind] or self.ids()
        return ids[number % len(ids)] if ids else ABSENT

    def device(self, index):
        """One that is there; None: there is none."""
        there = [device for device in self.devices if device]
        return there[index % len(there)] if there else None

    def dev(self, index):
        device = self.device(index)
        return device.dev if device else ABSENT

    def queue(self, number):
        """The descriptor of a queue that is open; None: there is none."""
        fds = [queue[1] for queue in self.queues if queue[1] is not None]
        return fds[number % len(fds)] if fds else None

    def busy(self, number):
        """Whether something uses the object."""
        held = [each for device in self.devices if device for each in (device.dev, device.on, device.pasid)]
        held += [queue[0] for queue in self.queues if queue[1] is not None]
        return number in held or any(number in thing.uses for thing in self.things.values())

    def _made(self, kind, answer, *uses):
        if isinstance(answer, int):
            self.things[answer] = Thing(kind, set(uses) - {None})
        return answer

    def _left(self, hwpt):
        """A device has left an HWPT."""
        if hwpt in self.things and self.things[hwpt].auto and not self.busy(hwpt):
            del self.things[hwpt]

    def _shown(self, hwpt, pt):
        """A device is on an HWPT, which an attach to an IOAS may have made."""
        if hwpt not in self.things:
            self.things[hwpt] = Thing("hwpt", {pt}, True)

    # ---- making

    def do_ioas(self):
        answer = self._made("ioas", outcome(self.env.ioas, self.iommufd))
        if isinstance(answer, int):
            self._map(answer)
        return answer

    def do_map(self, named):
        """What an unmap took."""
        return self._map(self.one(named))

    def _map(self, ioas):
        return outcome(self.env.map_file, self.iommufd, ioas, self.file, 0, PAGE, BASE)

    def do_hwpt(self, index, base, flags, queue):
        base, dev = self.one(base), self.dev(index)
        fault = self.one(queue) if flags & FAULT else None
        nested = base in self.things and self.things[base].kind != "ioas"
        data = bytes(iommu_hwpt_selftest()) if nested else b""
        fields = {"fault_id": fault} if fault else {}
        answer = outcome(self.env.hwpt, self.iommufd, dev, base, flags, data, **fields)
        return self._made("nested" if nested else "parent" if flags & NEST else "hwpt", answer, base, fault)

    def do_viommu(self, index, base):
        base, dev = self.one(base), self.dev(index)
        fields = {"type": IOMMU_VIOMMU_TYPE_SELFTEST, "dev_id": dev, "hwpt_id": base}
        made = outcome(self.env.call, self.iommufd, "IOMMU_VIOMMU_ALLOC", **fields)
        return self._made("viommu", made if isinstance(made, str) else made.out_viommu_id, base)

    def do_vdevice(self, index, viommu, virt_id):
        viommu, dev = self.one(viommu), self.dev(index)
        fields = {"viommu_id": viommu, "dev_id": dev, "virt_id": virt_id}
        made = outcome(self.env.call, self.iommufd, "IOMMU_VDEVICE_ALLOC", **fields)
        if isinstance(made, str):
            return made
        self.device(index).vdevice = made.out_vdevice_id
        return self._made("vdevice", made.out_vdevice_id, viommu)

    def do_faults(self):
        made = self.env.call(self.iommufd, "IOMMU_FAULT_QUEUE_ALLOC")
        self.queues.append([made.out_fault_id, self.env.owned(made.out_fault_fd)])
        return self._made("faults", made.out_fault_id)

    def do_events(self, viommu, depth):
        viommu = self.one(viommu)
        fields = {"viommu_id": viommu, "type": IOMMU_VEVENTQ_TYPE_SELFTEST, "veventq_depth": depth}
        made = outcome(self.env.call, self.iommufd, "IOMMU_VEVENTQ_ALLOC", **fields)
        if isinstance(made, str):
            return made
        self.queues.append([made.out_veventq_id, self.env.owned(made.out_veventq_fd)])
        return self._made("events", made.out_veventq_id, viommu)

    def do_hw_queue(self, viommu, index):
        """In the one page that each IOAS shows, as long as it does. Its access has a number too."""
        viommu = self.one(viommu)
        fields = {"viommu_id": viommu, "type": IOMMU_HW_QUEUE_TYPE_SELFTEST, "index": index}
        fields |= {"nesting_parent_iova": BASE + 8, "length": 64}
        made = outcome(self.env.call, self.iommufd, "IOMMU_HW_QUEUE_ALLOC", **fields)
        if isinstance(made, str):
            return made
        (parent,) = self.things[viommu].uses
        ioas = {number for number in self.things[parent].uses if self.things[number].kind == "ioas"}
        before = self.first_queues[viommu] if index else None
        if not index:
            self.first_queues[viommu] = made.out_hw_queue_id
        return self._made("hw", made.out_hw_queue_id, viommu, *ioas, before)

    def do_unmap(self, named):
        """What queues are in stays mapped."""
        ioas = self.one(named)
        there = ioas in self.things and self.things[ioas].kind == "ioas"
        held = there and any(thing.kind == "hw" and ioas in thing.uses for thing in self.things.values())
        answer = outcome(self.env.unmap, self.iommufd, ioas)
        if held and answer != "EBUSY":
            raise Impossible(f"unmap of IOAS {ioas} under a hardware queue: {answer}")
        return answer

    # ---- devices

    def do_device(self, pt):
        if None not in self.devices:
            return "enough"
        pt, flags = self.one(pt), MOCK_FLAGS_DEVICE_NO_DIRTY | MOCK_FLAGS_DEVICE_PASID
        made = outcome(self.env.mock, self.iommufd, pt, flags)
        if isinstance(made, tuple):
            stdev, hwpt, dev = made
            self.devices[self.devices.index(None)] = Device(stdev, dev, hwpt)
            self._shown(hwpt, pt)
        return made

    def do_gone(self, index):
        """Its vdevice goes along, and an automatic HWPT that it was alone on."""
        device = self.device(index)
        if device is None:
            return "no device"
        self._leave_pasid(device)
        self.env.destroy(self.iommufd, device.stdev)
        self.devices[self.devices.index(device)] = None
        self.things.pop(device.vdevice, None)
        self._left(device.on)
        return "gone"

    def do_replace(self, index, pt):
        device, pt = self.device(index), self.one(pt)
        if device is None:
            return "no device"
        answer = outcome(self.env.mock_replace, self.iommufd, device.stdev, pt)
        if isinstance(answer, int):
            left, device.on = device.on, answer
            self._shown(answer, pt)
            self._left(left)
        return answer

    def do_pasid(self, what, index, pt):
        device, pt = self.device(index), self.one(pt)
        if device is None:
            return "no device"
        if what == 2:
            self._leave_pasid(device)
            return "left"
        op = (IOMMU_TEST_OP_PASID_ATTACH, IOMMU_TEST_OP_PASID_REPLACE)[what]
        answer = outcome(self.env.pasid, self.iommufd, op, device.stdev, PASID, pt)
        if answer is None:
            device.pasid = pt
        return answer

    def _leave_pasid(self, device):
        """A mock device does not do so when it goes."""
        if device.pasid:
            self.env.pasid(self.iommufd, IOMMU_TEST_OP_PASID_DETACH, device.stdev, PASID)
            device.pasid = None

    # ---- queues

    def do_fault(self, index, pasid):
        fields = {"dev_id": self.dev(index), "pasid": pasid, "addr": len(self.answers)}
        fields = {f"trigger_iopf__{key}": value for key, value in fields.items()}
        return self._op(IOMMU_TEST_OP_TRIGGER_IOPF, **fields)

    def do_event(self, index):
        return self._op(IOMMU_TEST_OP_TRIGGER_VEVENT, trigger_vevent__dev_id=self.dev(index))

    def _op(self, op, **fields):
        answer = outcome(self.env.test, self.iommufd, op, **fields)
        return answer if isinstance(answer, str) else "done"

    def do_read(self, number, length):
        fd = self.queue(number)
        if fd is None:
            return "no queue"
        answer = outcome(self.env.read, fd, length)
        return [self.env.poll(fd), answer if isinstance(answer, str) else answer.hex()]

    def do_answer(self, number, cookie, code):
        fd = self.queue(number)
        if fd is None:
            return "no queue"
        return outcome(self.env.write, fd, bytes(uapi.iommu_hwpt_page_response(cookie, code)))

    def do_close(self, number):
        fd = self.queue(number)
        if fd is None:
            return "no queue"
        self.env.close(fd)
        for queue in self.queues:
            if queue[1] == fd:
                queue[1] = None
        return "closed"

    def do_invalidate(self, named):
        entry = iommu_hwpt_invalidate_selftest(0, 0)
        return self.env.invalidate(
            self.iommufd, self.one(named), IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, [entry]
        )

    # ---- destroying

    def do_destroy(self, named):
        return self._destroy(self.one(named))

    def _destroy(self, number):
        there = [device.stdev for device in self.devices if device]
        if number in there:
            return self.do_gone(there.index(number))
        there, busy = number in self.ids(), self.busy(number)
        answer = outcome(self.env.destroy, self.iommufd, number)
        if answer != ("ENOENT" if not there else "EBUSY" if busy else None):
            raise Impossible(f"destroy of {number}, {'used' if busy else 'not used'} there={there}: {answer}")
        if answer is None:
            del self.things[number]
            for device in self.devices:
                if device and device.vdevice == number:
                    device.vdevice = None
        return answer

    def do_destroy_all(self):
        """In the order of their numbers, until nothing is left."""
        for queue in self.queues:
            if queue[1] is not None:
                self.env.close(queue[1])
                queue[1] = None
        answers = []
        while ids := self.ids():
            before = len(answers)
            for number in ids:
                if number in self.ids():
                    answers.append([number, self._destroy(number)])
            if all(answer == "EBUSY" for _, answer in answers[before:]):
                raise Impossible(f"nothing of {ids} can be destroyed")
        return answers


__all__ = ["LAST", "Impossible", "ObjectRun", "generate"]
