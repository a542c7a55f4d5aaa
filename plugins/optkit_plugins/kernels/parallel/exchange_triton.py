"""The kernel that hands a tensor to every other GPU and takes theirs, in one launch."""

# Triton reads the kernels' own annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

#: Polls for a message before its values are given up as NaN: minutes, so that a process that is gone ends as an error, not as a hang.
MOST_POLLS = tl.constexpr(1 << 29)
NAN = tl.constexpr(0x7FC07FC0)


@triton.jit
def values(word, DTYPE: tl.constexpr):
    """The two values of a word in float32; of a float32, the value and nothing."""
    if DTYPE.primitive_bitwidth == 32:
        low = word.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    else:
        low = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def exchange(
    mine, residual, out, inbox, inboxes, epochs, words,
    RANK: tl.constexpr, WORLD: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, SUM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """``out`` (words,) is the sum of every process's ``mine`` (words,) and the ``residual`` (words,) that all of them hold, or
    (WORLD, words) holds theirs one after another.

    A word is 32 bits: one float32 or two 16-bit values. It travels as 64 bits with the number of the exchange (its epoch) in the upper
    half, so that data and the news of its arrival are one store. An inbox (2, WORLD, CAPACITY) has two halves that take turns: a process
    begins epoch n + 2 only after all have sent epoch n + 1, when they had read epoch n.

    :param inbox: this process's own. :param inboxes: (WORLD,) addresses of every process's.
    :param epochs: (programs,) exchanges so far, kept on the device, so that a recorded graph goes on counting.
    """
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    epoch = tl.load(epochs + program) + 1
    half = (epoch & 1) * (WORLD * CAPACITY)
    own = tl.load(mine + at, mask=inside, other=0)
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for step in tl.static_range(1, WORLD):
        theirs = tl.load(inboxes + (RANK + step) % WORLD).to(tl.pointer_type(tl.int64))
        tl.store(tl.multiple_of(theirs, 16) + half + RANK * CAPACITY + at, message, mask=inside)
    tl.debug_barrier()  # every thread has read the epoch, and no store waits behind the polls
    tl.store(epochs + program, epoch)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    if RESIDUAL:
        first, second = values(tl.load(residual + at, mask=inside, other=0), DTYPE)
    for source in tl.static_range(WORLD):  # in this order on every process: all round alike
        part = own
        if source != RANK:
            place = inbox + half + source * CAPACITY + at
            word = tl.load(place, mask=inside, other=message, volatile=True)
            polls = 0
            while (tl.min(((word >> 32) == epoch).to(tl.int32), axis=0) == 0) & (polls < MOST_POLLS):
                word = tl.load(place, mask=inside, other=message, volatile=True)
                polls += 1
            part = tl.where((word >> 32) == epoch, (word & 0xFFFFFFFF).to(tl.int32), NAN)
        if SUM:
            low, high = values(part, DTYPE)
            first += low
            second += high
        else:
            tl.store(out + source * words + at, part, mask=inside)
    if SUM:
        if DTYPE.primitive_bitwidth == 32:
            total = first.to(tl.int32, bitcast=True)
        else:
            below = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            total = (second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | below
        tl.store(out + at, total, mask=inside)
