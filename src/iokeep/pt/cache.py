# SPDX-License-Identifier: Apache-2.0
"""What compiled loops tell the cache: stores past it, and what is read next.

A plain store fetches the line that it is going to overwrite, slowly so in tables that lie anywhere in memory.
A non-temporal one (LLVM: metadata ``nontemporal`` of a store; x86 MOVNT*, Arm STNP) does not. What is to be
stored is made in a row of its own, which stays in the first cache. Such stores are weakly ordered (Intel SDM
vol. 1, 10.4.6.2): a loop ends with :func:`done`, before anything points to what it wrote.

Processors fetch ahead within a table, not from one to another that lies elsewhere: :func:`ahead` begins that.
In tables that are read in the order of memory it is of no use.

With ``NUMBA_DISABLE_JIT=1`` all is plain Python.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from iokeep.mem.memory import U64
from iokeep.pt.choice import jit

#: words of one store
_LANES = 4
#: bytes of a line, and how many of a table are fetched ahead: the processor goes on from there
_LINE, _LINES = 64, 8
_WORD = ir.IntType(64)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _plain_stream(to: U64, row: U64) -> None:
    to[:] = row[: len(to)]


def _plain_done() -> None:
    pass


def _plain_ahead(row: U64) -> None:
    pass


def _stream(typing: Any, to: Any, row: Any) -> Any:
    """``to[:] = row[:len(to)]``, of uint64 in a row each."""
    if any(a.dtype != types.uint64 or a.ndim != 1 or a.layout != "C" for a in (to, row)):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip(signature.args, arguments, strict=True)
        )
        size = builder.extract_value(target.shape, 0)
        vector = ir.VectorType(_WORD, _LANES).as_pointer()
        past = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        # A non-temporal store faults where it is not aligned.
        uneven = builder.or_(builder.ptrtoint(target.data, _WORD), builder.shl(size, _number(3)))
        even = builder.icmp_unsigned("==", builder.and_(uneven, _number(_LANES * 8 - 1)), _number(0))
        with builder.if_else(even) as (fast, slow):
            with fast, cgutils.for_range(builder, builder.udiv(size, _number(_LANES))) as loop:
                at = builder.mul(loop.index, _number(_LANES))
                words = builder.load(builder.bitcast(builder.gep(source.data, [at]), vector), align=8)
                place = builder.bitcast(builder.gep(target.data, [at]), vector)
                builder.store(words, place, align=_LANES * 8).set_metadata("nontemporal", past)
            with slow, cgutils.for_range(builder, size) as loop:
                word = builder.load(builder.gep(source.data, [loop.index]))
                builder.store(word, builder.gep(target.data, [loop.index]))
        return context.get_dummy_value()

    return types.void(to, row), code


def _done(typing: Any) -> Any:
    """What was stored before is there before what is stored later."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


def _ahead(typing: Any, row: Any) -> Any:
    """A row of uint64 is read soon. (A fetch of what is not there does nothing.)"""
    if row.dtype != types.uint64 or row.ndim != 1 or row.layout != "C":
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, small = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, small, small, small])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        how = [ir.Constant(small, value) for value in (0, 3, 1)]  # to be read, often, as data
        for line in range(_LINES):
            place = builder.gep(array.data, [_number(line * _LINE // 8)])
            builder.call(fetch, [builder.bitcast(place, byte), *how])
        return context.get_dummy_value()

    return types.void(row), code


stream: Any = intrinsic(_stream) if jit() else _plain_stream
done: Any = intrinsic(_done) if jit() else _plain_done
ahead: Any = intrinsic(_ahead) if jit() else _plain_ahead
