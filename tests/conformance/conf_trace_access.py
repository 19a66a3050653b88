# SPDX-License-Identifier: Apache-2.0
"""Emulated devices in random traces: pins, bytes and unmaps under them (see conf_traces.py)."""

from conf_env import PAGE, RW, R, W, outcome
from conf_selftest import MOCK_ACCESS_RW_SLOW_PATH, MOCK_FLAGS_ACCESS_WRITE

ACCESSES = 3
#: pages of each file whose pins are counted at the end of a trace
COUNTED = (0, 1, 2, 3, 510, 511)
MOST_PINS = 12


class Impossible(Exception):
    """A machine answered what no kernel may."""


def opening(rng, base):
    """How half of the traces begin: an IOAS that may be pinned, with areas side by side in whole pages."""
    out, iova = [["access", 0, 0, 1]], base
    for _ in range(rng.randrange(1, 5)):
        length = rng.choice([1, 2, 3, 8, 513]) * PAGE
        start = rng.choice([0, 0, 1, 3, 510]) * PAGE
        file = [rng.randrange(2)] if rng.randrange(2) else []
        out.append(["map_file" if file else "map", 0, *file, start, length, iova, rng.choice([RW, RW, R, W])])
        iova += length + rng.choice([0, 0, PAGE])
    return out


def makers(rng, obj, iova, size):
    """(weight, maker) of each operation. Ranges are of areas that are there, or beside them."""
    some = [1, 2, 3, 50, PAGE, PAGE + 1, 3 * PAGE]
    starts = [0, 0, 0, PAGE, 2 * PAGE, 511 * PAGE, -PAGE, 1, 4000, 4095]

    def access():
        return rng.randrange(ACCESSES)

    def part(lengths):
        return [rng.randrange(8), rng.choice(starts), rng.choice(lengths)]

    return [
        (5, lambda: ["access", access(), obj(rng), rng.choice([0, 1, 1, 1])]),
        (2, lambda: ["access_close", access()]),
        (4, lambda: ["access_replace", access(), obj(rng)]),
        (2, lambda: ["pin", access(), iova(rng), size(rng), rng.randrange(2)]),
        (14, lambda: ["pin_part", access(), *part([None, None, PAGE, PAGE, 2 * PAGE, size(rng)]),
                      rng.randrange(2)]),
        (5, lambda: ["unpin", access(), rng.randrange(6)]),
        (8, lambda: ["rw", access(), *part(some), rng.randrange(2), rng.randrange(2)]),
    ]  # fmt: skip


class AccessSteps:
    """Operations of a run on its emulated devices: [descriptor, IOAS, number of the next pin] each."""

    def access(self, number):
        """[descriptor, IOAS, number of the next pin]; None where there is none."""
        return self.accesses[number % len(self.accesses)] if self.accesses else None

    def do_access(self, index, number, pins):
        """One more, up to as many as there may be."""
        if len(self.accesses) == ACCESSES:
            self.do_access_close(index)
        ioas = self.ioas(number)
        answer = outcome(self.env.access, self.iommufd, ioas, pins)
        if isinstance(answer, str):
            return answer
        self.accesses.append([answer, ioas, 0])
        return "made"

    def do_access_close(self, index):
        access = self.access(index)
        if not access:
            return "no access"
        self.env.close(access[0])
        self.accesses.remove(access)
        return "closed"

    def do_access_replace(self, index, number):
        access, ioas = self.access(index), self.ioas(number)
        if not access:
            return "no access"
        answer = outcome(self.env.access_replace, self.iommufd, access[0], ioas)
        if answer is None:
            access[1] = ioas
        return answer

    def _look(self, number, which):
        """An access that looks at areas, and one of these; None where there is none."""
        looking = [access for access in self.accesses if self.shadow.areas[access[1]]]
        if not looking:
            return None
        access = looking[number % len(looking)]
        areas = sorted(self.shadow.areas[access[1]], key=lambda a: a.iova)
        return access, areas[which % len(areas)]

    def _behind(self, access, iova, length, *, write):
        """The pieces of areas that a range shows; None where no kernel may give them to an access."""
        pieces = self.shadow.source(access[1], iova, length)
        if pieces is None or any(not piece.flags & (W if write else R) for piece in pieces):
            return None
        return pieces

    def do_pin(self, index, iova, length, write):
        access = self.access(index)
        return self._pin(access, iova, length, write) if access else "no access"

    def _pin(self, access, iova, length, write):
        pieces = self._behind(access, iova, length, write=write)
        hva = 0
        if pieces and len(pieces) == 1 and self.fits(pieces[0]):
            hva = self.maps[pieces[0].file].hva + pieces[0].start
        flags = MOCK_FLAGS_ACCESS_WRITE if write else 0
        answer = outcome(self.env.pin, self.iommufd, access[0], iova, length, flags, hva)
        if answer == "EBADE":
            raise Impossible(f"a pin of {iova:#x} + {length:#x} is not of {pieces}")
        if isinstance(answer, int):
            if pieces is None:
                raise Impossible(f"a pin of {iova:#x} + {length:#x}, where there is a hole or no right")
            access[2] = answer + 1
        return answer

    def do_pin_part(self, index, which, start, length, write):
        """Of an area that is there; ``length`` None: all of it."""
        found = self._look(index, which)
        if not found:
            return "no area"
        access, area = found
        if length is None:
            return self._pin(access, area.iova, area.length, write)
        return self._pin(access, max(0, area.iova + start), length, write)

    def do_unpin(self, index, back):
        """One of the last pins."""
        access = self.access(index)
        if not access:
            return "no access"
        return outcome(self.env.unpin, self.iommufd, access[0], max(0, access[2] - 1 - back))

    def do_rw(self, index, which, start, length, write, slow):
        found = self._look(index, which)
        if not found:
            return "no area"
        access, area = found
        iova = max(0, area.iova + start)
        pieces = self._behind(access, iova, length, write=write)
        if pieces is not None and not all(self.fits(piece) for piece in pieces):
            return "past the end of a file"
        self.wrote += 1
        data = bytes((self.wrote * 7 + i) % 256 for i in range(length)) if write else length
        answer = outcome(
            self.env.rw, self.iommufd, access[0], iova, data, MOCK_ACCESS_RW_SLOW_PATH if slow else 0
        )
        if isinstance(answer, str):
            return answer
        if pieces is None:
            raise Impossible(f"bytes of {iova:#x} + {length:#x}, where there is a hole or no right")
        found = b"".join(self.maps[p.file].read(p.start, p.length) for p in pieces)
        # a write may have hit the same bytes of the file twice
        if answer != found and not (write and len(pieces) > 1):
            raise Impossible(f"{iova:#x} + {length:#x} is not what {pieces} hold")
        return answer.hex()

    def pins(self):
        """How often pages of the files are pinned; of user memory, those of its window."""

        def count(hva):
            found = (n for n in range(MOST_PINS) if self.env.pins(self.iommufd, hva, PAGE, n))
            return next(found, -1)

        starts = [mapping.hva for mapping in self.maps[:-1]] + [self.maps[-1].hva + self.window]
        return [count(start + page * PAGE) for start in starts for page in COUNTED]


__all__ = ["ACCESSES", "AccessSteps", "Impossible", "makers"]
