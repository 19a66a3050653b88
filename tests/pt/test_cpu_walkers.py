# SPDX-License-Identifier: Apache-2.0
"""x86_64 and RISC-V tables against another project's walker: QEMU's MMU, as the Unicorn engine ships it.

Physical memory holds its own address in every word, so what a load returns says where it went.
"""

import numpy as np
import pytest

from iokeep.errors import MemoryAbsent
from iokeep.pt.extents import Extents
from iokeep.pt.registry import open_format
from iokeep.pt.walk import walk

unicorn = pytest.importorskip("unicorn", reason="the Unicorn engine is not installed (requirements/dev.in)")

DATA, DATA_SIZE = 1 << 30, 32 << 20
CODE = 0x3F000
SIZE = 1 << 18


class X86:
    """Long mode, ring 0, CR0.WP: everything but U/S is as for a user request."""

    load, store = bytes.fromhex("488b07"), bytes.fromhex("488907")  # mov rax,[rdi]; mov [rdi],rax

    def __init__(self, levels):
        from unicorn import x86_const as c

        self.fmt = open_format("x86_64", {"levels": levels, "output_bits": 40})
        self.c, self.levels = c, levels
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.value, self.address = c.UC_X86_REG_RAX, c.UC_X86_REG_RDI

    def enter(self, root):
        c, uc = self.c, self.uc
        uc.reg_write(c.UC_X86_REG_CR3, root)
        pae_la57 = 1 << 5 | (1 << 12 if self.levels == 5 else 0)
        uc.reg_write(c.UC_X86_REG_CR4, uc.reg_read(c.UC_X86_REG_CR4) | pae_la57)
        uc.msr_write(0xC000_0080, 1 << 8 | 1 << 10 | 1 << 11)  # EFER: LME, LMA, NXE
        uc.reg_write(c.UC_X86_REG_CR0, 1 << 31 | 1 << 16 | 1)  # PG, WP, PE

    @staticmethod
    def compares(item):
        """Ring 0 does not look at U/S."""
        return bool(item & 1 << 2) or not item & 1


class RiscV:
    """User mode under satp. This QEMU is older than Svnapot and Svpbmt."""

    load, store = bytes.fromhex("03b50500"), bytes.fromhex("23b0a500")  # ld a0,0(a1); sd a0,0(a1)

    def __init__(self, levels):
        from unicorn import riscv_const as c

        # It sets A and D itself, as an IOMMU with tc.SADE does.
        config = {"levels": levels, "svnapot": 0, "svpbmt": 0, "hardware_ad": 1}
        self.fmt = open_format("riscv64", config)
        self.c, self.levels = c, levels
        self.uc = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
        self.value, self.address = c.UC_RISCV_REG_A0, c.UC_RISCV_REG_A1

    def enter(self, root):
        c, uc = self.c, self.uc
        uc.reg_write(c.UC_RISCV_REG_SATP, (5 + self.levels) << 60 | root >> 12)
        uc.reg_write(c.UC_RISCV_REG_PRIV, 0)

    @staticmethod
    def compares(item):
        """It ignores bits 63 and 62, and U, A and D in table items, all of which are reserved."""
        return not item >> 62 and (bool(item & 0xE) or not item & 0xD0)


class Machine:
    """A CPU with tables of its own, and the same in software RAM."""

    def __init__(self, cpu, new_table, one):
        kind, levels = cpu
        self.cpu = kind(levels)
        self.fmt = self.cpu.fmt
        self.built = new_table(self.fmt, size=SIZE)
        self.built.table.map(one)
        #: where the upper half begins
        self.code = 2**64 - (1 << (self.fmt.input_lg2 - 1))
        self.built.table.map(Extents.of([(self.code, self.code + 4095, CODE, 3)]))
        self.ram = self.built.ram
        uc = self.cpu.uc
        uc.mem_map(0, SIZE)
        uc.mem_write(0, bytes(self.ram.bytes[:SIZE]))
        uc.mem_write(CODE, self.cpu.load.ljust(64, b"\0") + self.cpu.store)
        uc.mem_map(DATA, DATA_SIZE)
        uc.mem_write(DATA, np.arange(DATA, DATA + DATA_SIZE, 8, dtype=np.uint64).tobytes())
        self.cpu.enter(self.built.table.root_pa)
        self.state = uc.context_save()

    def set_item(self, at, item):
        raw = item.to_bytes(8, "little")
        self.ram.write(at, raw)
        self.cpu.uc.mem_write(at, raw)
        self.cpu.uc.ctl(unicorn.unicorn_const.UC_CTL_TLB_FLUSH, unicorn.unicorn_const.UC_CTL_IO_WRITE)

    def _run(self, iova, code, offset):
        uc = self.cpu.uc
        begin = self.code + offset
        uc.reg_write(self.cpu.address, iova)
        try:
            uc.emu_start(begin, begin + len(code))
        except unicorn.UcError:
            uc.context_restore(self.state)  # else the next fault is a double fault
            return None
        return uc.reg_read(self.cpu.value)

    def loads(self, iova):
        """Where a load goes, None = it faults."""
        return self._run(iova, self.cpu.load, 0)

    def stores(self, iova, pa):
        """Whether a store reaches ``pa``."""
        self.cpu.uc.reg_write(self.cpu.value, pa)  # memory goes on holding its address
        return self._run(iova, self.cpu.store, 64) is not None


MAPPINGS = [
    (0x1000, 0x1FFF, DATA + 0x5000, 3),
    (0x2000, 0x2FFF, DATA + 0x9000, 1),
    (0x5000, 0x6FFF, DATA + 0x1F000, 3),
    (0x40_0000, 0x5F_FFFF, DATA + 0x80_0000, 3),
    (0x80_0000, 0x9F_FFFF, DATA + 0xA0_0000, 1),
    (0x1234_5000, 0x1234_6FFF, DATA + 0x10_0000, 3),
    (0x30_0000_0000, 0x30_0000_0FFF, DATA, 3),
]
CPUS = [(X86, 4), (X86, 5), (RiscV, 3), (RiscV, 4), (RiscV, 5)]
every_cpu = pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: f"{cpu[0].__name__}-{cpu[1]}")


def compare(machine, iova):
    """What both say of one IOVA; None where the answer lies outside of the memory that both have."""
    try:
        mine = walk(machine.fmt, machine.ram, machine.built.table.root_pa, iova)
    except MemoryAbsent:
        return None
    if mine.pa is not None and not DATA <= mine.pa < DATA + DATA_SIZE:
        return None
    pa = machine.loads(iova)
    assert pa == (mine.pa if mine.prot & 1 else None), hex(iova)
    if pa is not None:
        assert machine.stores(iova, pa) == bool(mine.prot & 2), hex(iova)
    return mine


@every_cpu
def test_what_is_mapped_and_what_is_not(cpu, new_table):
    machine = Machine(cpu, new_table, Extents.of(MAPPINGS))
    for first, last, pa, prot in MAPPINGS:
        for iova in (first, last - 7, (first + last) // 2 & ~7):
            mine = compare(machine, iova)
            assert (mine.pa, mine.prot) == (pa + iova - first, prot)
        for iova in (first - 8, last + 1):
            compare(machine, iova)
    for bit in range(13, 64):
        for iova in (1 << bit, 2**64 - (1 << bit)):
            if iova != machine.code:
                compare(machine, iova)


@pytest.mark.parametrize("iova", [0x1008, 0x2010, 0x40_3008, 0x80_5000, 0x30_0000_0000])
@every_cpu
def test_every_bit_of_every_item_on_the_path(cpu, new_table, iova):
    machine = Machine(cpu, new_table, Extents.of(MAPPINGS))
    path = walk(machine.fmt, machine.ram, machine.built.table.root_pa, iova).steps
    compared = 0
    for _, at, item in path:
        for bit in range(64):
            if not cpu[0].compares(item ^ 1 << bit):
                continue
            machine.set_item(at, item ^ 1 << bit)
            compared += compare(machine, iova) is not None
        machine.set_item(at, item)
        assert compare(machine, iova).pa is not None
    assert compared > 20 * len(path)


@every_cpu
def test_random_items(cpu, new_table):
    rng = np.random.default_rng(3)
    machine = Machine(cpu, new_table, Extents.of(MAPPINGS))
    compared = 0
    for first, *_ in MAPPINGS:
        for _, at, item in walk(machine.fmt, machine.ram, machine.built.table.root_pa, first).steps:
            for _ in range(24):
                flips = int(rng.integers(0, 1 << 62)) & int(rng.integers(0, 1 << 62))
                flips &= 0xFFF | 0xFFF << 52
                if not cpu[0].compares(item ^ flips):
                    continue
                machine.set_item(at, item ^ flips)
                compared += compare(machine, first) is not None
            machine.set_item(at, item)
    assert compared > 100
