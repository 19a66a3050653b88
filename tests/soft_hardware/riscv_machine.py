# SPDX-License-Identifier: Apache-2.0
"""A machine with just enough of a kernel to program its RISC-V IOMMU."""

import numpy as np

from iokeep.pt.build import Table
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.roots import riscv
from iokeep.soft.hardware.platform import Platform
from iokeep.soft.hardware.units import riscv as r

STAGES = (1, 2)
COMMANDS, RECORDS = 64, 4


class Machine:
    """A platform, frames that are never freed, one domain (tag 5) for all devices, both queues."""

    def __init__(self, devices=1, stage=1, levels=4, directory=2, tc=0, **config):
        self.platform = Platform.create(8 << 20, devices, iommu="riscv")
        self.ram, self.regs = self.platform.ram, self.platform.iommu
        self.stage, self.levels, self.directory, self.tc, self.tag = stage, levels, directory, tc, 5
        self.next = 16 << 12
        config = {"levels": levels, "stage": stage, "hardware_ad": 0, **config}
        self.fmt = open_format("riscv64", config)
        self.table = Table.create(self.fmt, self.ram, self.alloc, lambda pas, size=4096: None)
        self.ddt = [self.page() for _ in range(directory)]  # leaf first
        self.status, self.queue, self.faults = self.page(), self.page(), self.page()
        for level in range(directory - 1, 0, -1):
            self.ram.store64(self.ddt[level], riscv.directory_entry(self.ddt[level - 1]))
        for index in range(devices):
            self.attach(index)
        self.regs.write64(r.CQB, r.queue_base(self.queue, COMMANDS.bit_length() - 1))
        self.regs.write32(r.CQCSR, r.QUEUE_EN)
        self.regs.write64(r.FQB, r.queue_base(self.faults, RECORDS.bit_length() - 1))
        self.regs.write32(r.FQCSR, r.QUEUE_EN)
        self.regs.write64(r.DDTP, riscv.ddtp_value(self.ddt[-1], directory))
        self.tail = self.sequence = 0

    def pages(self, n):
        self.next = -(-self.next // (n << 12)) * (n << 12)
        pa, self.next = self.next, self.next + (n << 12)
        assert self.next <= self.ram.size
        return pa

    def page(self):
        return self.pages(1)

    def alloc(self, n, size=4096):
        return np.array([self.pages(size >> 12) for _ in range(n)], np.uint64)

    def put(self, pa, words):
        for i, word in enumerate(words):
            self.ram.store64(pa + 8 * i, word)

    def dc_pa(self, index, page=None):
        device = self.platform.bdf(index)
        return (page or self.ddt[0]) + riscv.device_index(device, extended=False)[0] * 32

    def attach(self, index, table=None, tag=None, page=None):
        stage = riscv.Stage((table or self.table).root_pa, self.levels, self.tag if tag is None else tag)
        pair = (stage, None) if self.stage == 1 else (None, stage)
        self.put(self.dc_pa(index, page), riscv.device_context(*pair, extended=False, tc=self.tc))

    def other_table(self):
        return Table.create(self.fmt, self.ram, self.alloc, lambda pas, size=4096: None)

    def map(self, iova, pa, pages, prot=3, table=None):
        (table or self.table).map(Extents.of([(iova, iova + (pages << 12) - 1, pa, prot)]))

    def inval(self, iova=None, tag=None):
        tag = self.tag if tag is None else tag
        if self.stage == 1:
            return riscv.iotinval_vma(iova=iova, pscid=tag)
        return riscv.iotinval_gvma(iova=iova, gscid=tag)

    def submit(self, *commands):
        """Put commands and a fence into the queue; the sequence number that it stores."""
        self.sequence += 1
        for command in (*commands, riscv.iofence_c((self.status, self.sequence))):
            self.put(self.queue + 16 * self.tail, command)
            self.tail = (self.tail + 1) % COMMANDS
        self.regs.write32(r.CQT, self.tail)
        return self.sequence

    def done(self, sequence):
        return self.ram.load64(self.status) & 0xFFFFFFFF == sequence

    def record(self, n):
        """Record ``n`` of the fault queue."""
        return riscv.decode_fault([self.ram.load64(self.faults + 32 * n + 8 * i) for i in range(4)])
