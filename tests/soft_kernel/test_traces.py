# SPDX-License-Identifier: Apache-2.0
"""Random traces of iommufd calls against a model, with two IOASes, copies, and devices that come and go."""

import errno

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from soft_machine import MIB, Caller, R, W, boot, settled

from iokeep.pt.extents import Extents
from iokeep.soft.kernel.syserror import SysError

PAGE = 4096
#: IOVA slots of one page each; blocks of 512 make 2 MiB leaves possible
slots = st.one_of(
    st.integers(0, 64), st.integers(500, 1040), st.sampled_from([0, 512, 1024, 0xFEDFF, 0xFEE00])
)
lengths = st.one_of(st.integers(1, 8), st.sampled_from([512, 513, 600, 1024]))
offsets = st.one_of(st.integers(0, 600), st.sampled_from([0, 512]))
prots = st.sampled_from([R, W, R | W])
pick = st.integers(0, 1)
PROT = {R: 1, W: 2, R | W: 3}


class Traces(RuleBasedStateMachine):
    """``areas[i]`` of IOAS i: iova page -> (length, file page of each page, prot, pages were writable)."""

    @initialize(mode=st.sampled_from(["legacy", "scalable-fs", "scalable-ss"]), seed=st.integers(0, 3))
    def boot(self, mode, seed):
        self.kernel = boot(16 * MIB, iommu=mode, placement=f"mixed:{seed}")
        self.c = c = Caller(self.kernel)
        self.fd = c.iommu()
        self.m = c.memfd("ram", 1200 * PAGE)
        self.ioas = [c.ioas(self.fd), c.ioas(self.fd)]
        self.areas = [{}, {}]
        self.cdevs = [c.vfio(0), c.vfio(1)]
        self.devs = [c.bind(v, self.fd) for v in self.cdevs]
        self.attached = [None, None]  # device -> IOAS index
        self.hwpts = []  # (id, IOAS index)
        self.first_stage = mode == "scalable-fs"

    def errno_of(self, call):
        try:
            call()
        except SysError as error:
            return error.errno
        return 0

    def shown(self, i):
        return any(a == i for a in self.attached) or any(j == i for _, j in self.hwpts)

    def conflict(self, i, iova, n):
        last = iova + n - 1
        if any(a == i for a in self.attached) and iova <= 0xFEEFF and last >= 0xFEE00:
            return errno.EINVAL
        if any(at <= last and iova <= at + area[0] - 1 for at, area in self.areas[i].items()):
            return errno.EEXIST
        return 0

    @rule(i=pick, iova=slots, n=lengths, offset=offsets, prot=prots)
    def map(self, i, iova, n, offset, prot):
        want = self.conflict(i, iova, n)
        if not want and self.shown(i) and offset + n > 1200:
            want = errno.EINVAL
        if not self.shown(i) and offset + n > 1200:
            return  # would poison the next attach; tested elsewhere
        got = self.errno_of(
            lambda: self.c.map_file(self.fd, self.ioas[i], self.m, offset * PAGE, n * PAGE, iova * PAGE, prot)
        )
        assert got == want
        if not got:
            self.areas[i][iova] = (n, list(range(offset, offset + n)), prot, bool(prot & W))

    @rule(src=pick, dst=pick, start=slots, n=lengths, iova=slots, prot=prots)
    def copy(self, src, dst, start, n, iova, prot):
        pages, writable, at = [], True, start
        while len(pages) < n:
            hit = next(((a, x) for a, x in self.areas[src].items() if a <= at < a + x[0]), None)
            if hit is None:
                break
            a, x = hit
            take = min(a + x[0] - at, n - len(pages))
            pages.append((at - a, take, x))
            at += take
            if sum(p[1] for p in pages) >= n:
                break
        whole = sum(p[1] for p in pages) >= n
        writable = all(p[2][3] for p in pages)
        want = errno.ENOENT if not whole else self.conflict(dst, iova, n)
        if not want and prot & W and not writable:
            want = errno.EPERM
        got = self.errno_of(
            lambda: self.c.copy(
                self.fd, self.ioas[dst], self.ioas[src], start * PAGE, n * PAGE, iova * PAGE, prot
            )
        )
        assert got == want
        if not got:
            at = iova
            for skip, take, x in pages:
                self.areas[dst][at] = (take, x[1][skip : skip + take], prot, x[3])
                at += take

    @rule(i=pick, iova=slots, n=st.one_of(lengths, st.just(2000)))
    def unmap(self, i, iova, n):
        last = iova + n - 1
        inside = sorted(a for a, x in self.areas[i].items() if a <= last and iova <= a + x[0] - 1)
        want, gone = 0, []
        for a in inside:
            if a < iova or a + self.areas[i][a][0] - 1 > last:
                want = errno.ENOENT
                break
            gone.append(a)
        if not inside:
            want = errno.ENOENT
        removed = sum(self.areas[i].pop(a)[0] for a in gone)
        out = []
        got = self.errno_of(lambda: out.append(self.c.unmap(self.fd, self.ioas[i], iova * PAGE, n * PAGE)))
        assert got == want
        assert got or out == [removed * PAGE]

    @rule(i=pick)
    def unmap_all(self, i):
        assert self.c.unmap(self.fd, self.ioas[i]) == sum(x[0] for x in self.areas[i].values()) * PAGE
        self.areas[i].clear()

    @rule(d=pick, i=pick)
    def attach(self, d, i):
        clash = any(a <= 0xFEEFF and a + x[0] - 1 >= 0xFEE00 for a, x in self.areas[i].items())
        moved = self.attached[d] != i
        got = self.errno_of(lambda: self.c.attach(self.cdevs[d], self.ioas[i]))
        assert got == (errno.EADDRINUSE if clash and moved else 0)
        if not got:
            self.attached[d] = i

    @rule(d=pick)
    def detach(self, d):
        self.c.detach(self.cdevs[d])
        self.attached[d] = None

    @rule(d=pick, i=pick)
    def hwpt(self, d, i):
        self.hwpts.append((self.c.hwpt(self.fd, self.devs[d], self.ioas[i]), i))

    @precondition(lambda self: self.hwpts)
    @rule(data=st.data())
    def destroy_hwpt(self, data):
        number, _ = self.hwpts.pop(data.draw(st.integers(0, len(self.hwpts) - 1)))
        self.c.destroy(self.fd, number)

    @rule(i=pick)
    def destroy_ioas(self, i):
        want = errno.EBUSY if self.shown(i) else 0
        assert self.errno_of(lambda: self.c.destroy(self.fd, self.ioas[i])) == want
        if not want:
            self.areas[i].clear()
            self.ioas[i] = self.c.ioas(self.fd)

    @rule(i=pick)
    def punch_what_nobody_pins(self, i):
        if not any(self.areas):
            self.c.fallocate(self.m, 3, 0, 1200 * PAGE)

    def extents(self, i):
        pfns = self.c.process.file(self.m).pfns
        rows = []
        for iova, (n, pages, prot, _) in self.areas[i].items():
            bits = PROT[prot] | (self.first_stage and prot == W)
            rows += [
                ((iova + k) * PAGE, (iova + k) * PAGE + PAGE - 1, int(pfns[pages[k]]) * PAGE, bits)
                for k in range(n)
            ]
        return Extents.of(rows).canonical()

    @invariant()
    def tables_hold_the_areas(self):
        if not hasattr(self, "kernel"):
            return
        ictx = self.c.process.file(self.fd)
        for i in (0, 1):
            domains = ictx.ioas(self.ioas[i]).domains
            assert bool(domains) == self.shown(i)
            for domain in domains:
                got, want = domain.table.leaves().extents(), self.extents(i)
                for name in ("iova", "last", "pa", "prot"):
                    assert np.array_equal(getattr(got, name), getattr(want, name)), name

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "kernel"):
            return
        audit = self.kernel.audit()
        assert (audit.leaked, audit.wrongly_freed, audit.bad_unpins, audit.bad_puts) == (0, 0, 0, 0)

    def teardown(self):
        if hasattr(self, "kernel"):
            settled(self.kernel)


TestTraces = Traces.TestCase
TestTraces.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
