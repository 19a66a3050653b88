# SPDX-License-Identifier: Apache-2.0
"""Results for people: the step table of a rehearsal and its closing lines, all from the JSON document."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

__all__ = ["Progress", "count", "duration", "rehearsal", "size", "table"]

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def count(n: int) -> str:
    """``412003`` -> ``412 003``."""
    return f"{n:,}".replace(",", " ")


def size(n: int) -> str:
    """Bytes in the biggest binary unit that keeps it whole, or with one digit behind the point."""
    for unit, name in _UNITS:
        if n >= unit:
            return f"{n // unit} {name}" if n % unit == 0 else f"{n / unit:.1f} {name}"
    return f"{n} B"


def duration(ms: float) -> str:
    """Milliseconds as ``38 us``, ``4.1 ms`` or ``1.2 s``."""
    if ms < 0.9995:
        return f"{ms * 1000:.0f} us"
    if ms < 999.5:
        return f"{ms:.1f} ms"
    return f"{ms / 1000:.2f} s"


def plural(n: int, one: str, many: str = "") -> str:
    """``1 area``, ``5 areas``."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines with columns as wide as their widest cell; those numbered in ``right`` are aligned right."""
    widths = [
        max((len(r[i]) for r in rows if i < len(r)), default=0) for i in range(max(map(len, rows), default=0))
    ]
    out = []
    for r in rows:
        cells = [c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(r)]
        out.append("  ".join(cells).rstrip())
    return out


class Progress:
    """Lines on stderr while something runs, and only where a person watches.

    :param stream: where to; its ``isatty()`` decides. :param quiet: never say anything.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on = not quiet and self._stream.isatty()
        self._width = 0

    def say(self, text: str) -> None:
        """Show ``text`` in place of the line before."""
        if self._on:
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def done(self) -> None:
        """Wipe the line."""
        if self._on and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def mismatch(m: Mapping[str, Any]) -> str:
    """One mismatch: iova, expected, found, why."""

    def side(pa: Any, prot: Any) -> str:
        return "nothing" if pa is None else f"pa {pa} {prot or ''}".rstrip()

    if m["reason"] == "digest":
        return "the areas are not those whose translations were sealed (digest)"
    where = m["iova"] if m["iova"] == m["last"] else f"{m['iova']}-{m['last']}"
    if m["reason"] == "span":
        return f"iova {where}: one leaf crosses the edge of an area (span)"
    nothing = m.get("expected_pa") is None and m.get("found_pa") is None
    if nothing and m["reason"] in ("loop", "absent", "reserved", "prot"):
        return f"iova {where}: the tables are not fit to be adopted ({m['reason']})"
    expected = side(m.get("expected_pa"), m.get("expected_prot"))
    found = side(m.get("found_pa"), m.get("found_prot"))
    return f"iova {where}: expected {expected}, found {found} ({m['reason']})"


def _gap(t: Mapping[str, Any]) -> str:
    """The longest time without DMA, and the longest not spent waiting for a CPU of this machine."""
    wall, on_cpu = t["max_gap_us"], t.get("max_gap_on_cpu_us")
    if on_cpu is None or round(on_cpu) >= round(wall):
        return f"gap {duration(wall / 1e3)}"
    return f"gap {duration(wall / 1e3)} ({duration(on_cpu / 1e3)} on CPU)"


def _what(step: str, doc: Mapping[str, Any]) -> str:
    """What a step did, in a few words, from the facts of the run."""
    guest, restore, dma = doc["guest"], doc["restore"], doc["dma"]
    devices = plural(guest["devices"], "device")
    refused = doc["outcome"] == "refused"
    if step == "setup":
        files = plural(guest["files"], "memfd")
        return f"{plural(guest['areas'], 'area')} on {files}, {devices} at work"
    if step == "preserve":
        return f"{plural(guest['files'], 'memfd')}, manifest, iommufd, {devices}"
    if step == "freeze":
        pages = doc.get("freeze", {}).get("table_pages")
        return f"{plural(pages, 'table page')}" if pages else ""
    if step == "kexec":
        return f"kernel {doc['kernels']['from']} is gone"
    if step == "boot":
        return f"kernel {doc['kernels']['to']}: DMA went on, {count(dma['during_kexec'])} transactions"
    if step == "retrieve":
        return f"a new VMM has session {doc['guest']['name']}"
    if step == "replay":
        return f"{plural(restore['areas'], 'area')} on the preserved memfds"
    if step == "validate":
        if doc["policy"] == "trust":
            return "no check at all"
        if doc["policy"] == "sealed" and not refused:
            return "the areas have the digest that was sealed"
        found = len(restore["mismatches"])
        if refused and found:
            total = restore.get("total_mismatches", found)
            return plural(total, "difference")
        if not restore["pages"]:
            return ""
        return f"{count(restore['pages'])} pages, 0 differences, {restore['ns_per_page']:.2f} ns/page"
    if step in ("adopt", "switch"):
        if refused:
            return "not done"
        verb = "replaced hitlessly" if step == "switch" else "is the HWPT of the new IOAS"
        if doc["policy"] in ("deferred", "sealed"):
            verb += ", each range proved before its use"
        return f"prior domain {verb}"
    if step == "finish":
        return "nothing unclaimed" if not refused else ""
    if step == "after":
        return "devices work on everything" if not refused else "devices go on, on the prior tables"
    if step == "teardown":
        if refused:
            return "devices stop; the prior domain stays held"
        if doc["outcome"] == "contained":
            return "guest unmaps all but what is quarantined; the table goes as a whole"
        return f"guest unmaps all, {count(dma.get('denied', 0))} probes denied"
    return ""


def rehearsal(doc: Mapping[str, Any]) -> str:
    """The table of a rehearsal and its verdict, from the document ``iokeep.rehearse-v1``."""
    guest, restore, dma, frames = doc["guest"], doc["restore"], doc["dma"], doc["frames"]
    kernels, devices = doc["kernels"], plural(guest["devices"], "device")
    pages = {"mixed": "4K and 2M", "captured": "the capture's"}.get(guest["page_size"], guest["page_size"])
    head = (
        f"{guest['name']}: {size(guest['ram'])} in {pages} pages, {guest['format']}, "
        f"{devices}   {kernels['from']} -> {kernels['to']}   policy {doc['policy']}"
    )
    lines = [head]
    if doc.get("like"):
        same = doc["like"]
        verdict = "equal" if same["equal"] else f"NOT equal: {same['why']}"
        lines.append(f"like {same['source']}: {count(same['leaves'])} leaves, sizes and scatter {verdict}")
    lines += [f"injected {i['fault']}: {i['what']}" for i in doc["injected"]]
    lines += [
        f"injected kill-at={step}: the VMM was killed and started again" for step in doc.get("killed", [])
    ]
    rows = []
    if doc.get("compile_ms"):
        rows.append(["  compile", duration(doc["compile_ms"]), "the DMA engine, once per machine", ""])
    for t in doc["timeline"]:
        moved = f"{count(t['transactions'])} DMA, {_gap(t)}" if t["transactions"] else ""
        rows.append([f"  {t['step']}", duration(t["ms"]), _what(t["step"], doc), moved])
    lines += table(rows, right=(1,))
    lines += [f"  {mismatch(m)}" for m in restore["mismatches"][:4]]
    total = restore.get("total_mismatches", len(restore["mismatches"]))
    if total > 4:
        lines.append(f"  ... {count(total)} in all")
    damage = f"{count(dma['lost'])} lost, {count(dma['misdirected'])} misdirected"
    if dma["faults"]:
        damage += f", {count(dma['faults'])} faults"
    if dma.get("leaks"):
        damage += f", {count(dma['leaks'])} through ranges that are not mapped"
    lines.append(
        f"{doc['outcome']}: {count(dma['transactions'])} DMA transactions, {damage}, longest {_gap(dma)}; "
        f"{count(frames['leaked'])} frames leaked, "
        f"{count(frames['wrongly_freed'])} wrongly freed"
    )
    if doc["reason"]:
        lines.append(f"why: {doc['reason']}")
    if doc.get("next"):
        lines.append(f"next: {doc['next']}")
    return "\n".join(lines) + "\n"
