# SPDX-License-Identifier: Apache-2.0
"""The kernel's own ``iova_to_phys`` as a peer: page-table code of a Linux source tree, in user space.

The tree is the user's. Its files are compiled as they are, with linux_shim.h in place of the kernel around
them, into a temporary directory that is removed once the result is loaded: nothing of the tree (GPL-2.0) is
kept.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from iokeep.bench.peers import compiler
from iokeep.errors import InputError
from iokeep.mem.ram import Ram
from iokeep.pt.extents import Extents
from iokeep.pt.formats.base import Format

_HERE = Path(__file__).parent
_IOMMU = "drivers/iommu"
#: header of the tree -> the tree's own headers that take its place; none: linux_shim.h has what is used of it
_IN_PLACE_OF: dict[str, tuple[str, ...]] = {
    # As arch/*/include/asm/Kbuild does where an architecture has no header of its own.
    **{
        f"asm/{name}.h": (f"asm-generic/{name}.h",)
        for name in ("barrier", "bitsperlong", "errno", "ioctl", "percpu_types", "posix_types", "rwonce")
    },
    "asm/types.h": ("asm-generic/int-ll64.h",),
    "asm/byteorder.h": ("linux/byteorder/little_endian.h",),
    # All of asm-generic/bitops.h that does not need atomic.h.
    "asm/bitops.h": tuple(
        f"asm-generic/bitops/{name}.h"
        for name in ("builtin-__ffs", "builtin-__fls", "builtin-ffs", "builtin-fls", "fls64", "ffz",
                     "hweight", "non-atomic")
    ),
    **dict.fromkeys(
        ("generated/autoconf.h", "asm/div64.h", "asm/page.h", "asm/string.h", "asm/swab.h", "linux/atomic.h",
         "linux/bug.h", "linux/device.h", "linux/dma-mapping.h", "linux/export.h", "linux/io.h",
         "linux/kernel.h", "linux/mm_types.h", "linux/numa.h", "linux/of.h", "linux/scatterlist.h",
         "linux/slab.h"),
        (),
    ),
}  # fmt: skip
#: Of KBUILD_CFLAGS (Makefile) those that have a say in the code of a function. By these gcc 12 makes the
#: same functions of generic_pt, inlined alike, as in a kernel built with -O2. Not taken over: what makes them
#: slower there (retpolines, -ftrivial-auto-var-init). No vectors, as the kernel has none.
FLAGS = (
    "-O2", "-std=gnu11", "-fms-extensions", "-funsigned-char", "-fno-common", "-fno-strict-aliasing",
    "-fno-delete-null-pointer-checks", "-fno-strict-overflow", "-fno-tree-vectorize",
)  # fmt: skip
_ERRORS = (
    "-Werror=implicit-function-declaration",
    "-Werror=int-conversion",
    "-Werror=incompatible-pointer-types",
)


def _generic_pt(
    file: str, name: str, features: str, *more: str, top: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources and options of a format of generic_pt.

    :param features: without PT_FEAT_. :param top: member of the configuration for the top level.
    """
    bits = "|".join(f"BIT(PT_FEAT_{feature})" for feature in features.split())
    options = (f"-DGENERIC_PT={name}", f"-DFEATURES=({bits})", *more)
    return (f"{_IOMMU}/generic_pt/fmt/{file}.c",), (*options, f"-DTOP={top}") if top else options


def _io_pgtable(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (f"{_IOMMU}/io-pgtable-arm.c", f"{_IOMMU}/io-pgtable.c"), (f"-DIO_PGTABLE={name}",)


#: format -> (files of the tree, options); features as the drivers ask for them (intel/iommu.c, amd/iommu.c,
#: riscv/iommu.c)
_FORMATS = {
    "vtdss": _generic_pt("iommu_vtdss", "vtdss", "FLUSH_RANGE", top="top_level"),
    "x86_64": _generic_pt("iommu_x86_64", "x86_64", "FLUSH_RANGE SIGN_EXTEND", top="top_level"),
    "amdv1": _generic_pt(
        "iommu_amdv1", "amdv1", "FLUSH_RANGE DYNAMIC_TOP AMDV1_ENCRYPT_TABLES AMDV1_FORCE_COHERENCE",
        "-DDYNAMIC_TOP", top="starting_level",
    ),
    "riscv64": _generic_pt(
        "iommu_riscv64", "riscv_64", "FLUSH_RANGE SIGN_EXTEND RISCV_SVNAPOT_64K DETAILED_GATHER"
    ),
    "arm_lpae_s1": _io_pgtable("ARM_64_LPAE_S1"),
    "arm_lpae_s2": _io_pgtable("ARM_64_LPAE_S2"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelWalk:
    """One compiled format."""

    library: ctypes.CDLL

    def open(self, fmt: Format, ram: Ram, root_pa: int) -> None:
        """Make a domain of the table. :raises InputError: the kernel's code refuses this configuration."""
        # A dynamic top grows to all of 64 bits.
        lg2 = 64 if fmt.name == "amdv1" else fmt.input_lg2
        oa_lg2, granule = int(fmt.config["output_bits"]), 1 << fmt.levels[0].shift
        error = self.library.iokeep_open(
            ctypes.c_ulong(ram.bytes.ctypes.data), ctypes.c_uint64(root_pa),
            ctypes.c_uint(len(fmt.levels)), ctypes.c_uint(lg2), ctypes.c_uint(oa_lg2),
            ctypes.c_ulong(granule),
        )  # fmt: skip
        if error:
            raise InputError(f"{fmt.name}: the kernel's code makes no domain of this: errno {-error}")

    def wrong_pages(self, e: Extents) -> int:
        """Ask for every expected page of 4096 bytes; how many are elsewhere or nowhere."""
        columns = [np.ascontiguousarray(column) for column in (e.iova, e.last, e.pa)]
        pointers = (ctypes.c_void_p(column.ctypes.data) for column in columns)
        return int(self.library.iokeep_wrong_pages(*pointers, ctypes.c_uint64(len(e))))


@dataclass(slots=True)
class KernelSource:
    """A Linux source tree. :param missing: format -> why it cannot be measured, of those asked for."""

    path: Path
    version: str
    missing: dict[str, str] = field(default_factory=dict)
    _compiled: dict[str, KernelWalk | None] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path) -> KernelSource:
        """:raises InputError: this is no Linux source tree, or one without generic page tables."""
        hint = "name the directory of an unpacked Linux 7.x source, the one that has MAINTAINERS"
        try:
            head = (path / "Makefile").read_text(encoding="utf-8")[:400]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is no Linux source tree: its Makefile cannot be read: {error}", hint
            ) from error
        parts = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL) = (\d+)$", head, re.MULTILINE))
        if len(parts) != 3:
            raise InputError(f"{path} is no Linux source tree: its Makefile names no version", hint)
        version = ".".join(parts[name] for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
        if not (path / _IOMMU / "generic_pt/iommu_pt.h").is_file():
            raise InputError(f"{path} is Linux {version}, without {_IOMMU}/generic_pt", hint)
        return cls(path.resolve(), version)

    def walk(self, name: str) -> KernelWalk | None:
        """The code of a format, compiled the first time; None = :attr:`missing` says why not."""
        if name not in self._compiled:
            made = self._compile(name)
            if isinstance(made, str):
                self.missing[name] = made
            self._compiled[name] = made if isinstance(made, KernelWalk) else None
        return self._compiled[name]

    def _compile(self, name: str) -> KernelWalk | str:
        command = compiler()
        if command is None:
            return "no C compiler (cc, gcc or clang) is installed"
        sources, options = _FORMATS[name]
        with tempfile.TemporaryDirectory(prefix="iokeep-bench-") as place:
            headers = _headers(Path(place) / "include")
            include = self.path / "include"
            out = Path(place) / "walk.so"
            words: list[str | Path] = [
                command, *FLAGS, *_ERRORS, "-nostdinc", "-D__KERNEL__", *options,
                f"-I{headers}", f"-I{include}", f"-I{include / 'uapi'}",
                "-include", include / "linux/compiler_types.h", "-include", include / "linux/kconfig.h",
                "-include", _HERE / "linux_shim.h", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-z,defs",
                *(self.path / source for source in sources), _HERE / "kernel_walk.c", "-o", out,
            ]  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
                return f"{command} failed on Linux {self.version}: {(errors or ['no word'])[0]}"
            try:
                library = ctypes.CDLL(str(out))
            except OSError as error:
                return f"what {command} made cannot be loaded: {error}"
        library.iokeep_open.restype = ctypes.c_int
        library.iokeep_wrong_pages.restype = ctypes.c_uint64
        return KernelWalk(library)


def _headers(root: Path) -> Path:
    """Write the headers of :data:`_IN_PLACE_OF`."""
    for name, instead in _IN_PLACE_OF.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"#include <{header}>\n" for header in instead), encoding="ascii")
    return root
