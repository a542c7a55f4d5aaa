"""Intervals and tests, in plain Python: small numbers of repeats, no assumption of normality."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

#: A difference of speed below this is not claimed, however narrow its interval: it could not be reproduced on another day.
SMALLEST_EFFECT = 0.02
BOOTSTRAP_SAMPLES = 200
BOOTSTRAP_ROUNDS = 1000


@dataclass(frozen=True)
class Interval:
    """A median with its order-statistic interval. ``coverage`` is the exact confidence, below 0.95 where n is under 6."""

    value: float
    low: float
    high: float
    n: int
    coverage: float


def order_statistic_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median and the narrowest symmetric pair of order statistics that covers it with ``confidence`` (n = 10: ranks 2 and 9).

    P(rank k below the median …) is binomial: coverage = 1 − 2·P(Bin(n, ½) < k). (David & Nagaraja, Order Statistics, 7.1)
    """
    ordered = sorted(values)
    n = len(ordered)
    if not n:
        raise ValueError("no values")
    rank, tail = 1, _binomial_tail(n, 1)
    while rank + 1 <= n // 2 and 1 - 2 * _binomial_tail(n, rank + 1) >= confidence:
        rank += 1
        tail = _binomial_tail(n, rank)
    return Interval(median(ordered), ordered[rank - 1], ordered[n - rank], n, max(0.0, 1 - 2 * tail))


def _binomial_tail(n: int, k: int) -> float:
    """P(Bin(n, ½) < k)."""
    return sum(math.comb(n, i) for i in range(k)) / 2**n


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast, with its interval. ``differs`` where a difference may be claimed."""

    ratio: float
    low: float
    high: float
    n: int
    coverage: float
    differs: bool


def speed_up(baseline: Sequence[float], other: Sequence[float], noise: float = 0.0) -> SpeedUp:
    """Median of the paired ratios baseline/other of seconds, one value a process pair.

    A difference is claimed where an interval of at least 95 % excludes 1 *and* the effect is at least ``max(2 %, noise)``.

    :param noise: |log A′/A| of the same run: what two untouched baselines differed by.
    """
    interval = order_statistic_interval([math.log(first / second) for first, second in zip(baseline, other, strict=True)])
    excludes = interval.coverage >= 0.95 and not interval.low <= 0 <= interval.high
    differs = excludes and abs(interval.value) >= max(math.log1p(SMALLEST_EFFECT), noise)
    return SpeedUp(math.exp(interval.value), math.exp(interval.low), math.exp(interval.high), interval.n, interval.coverage, differs)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test on paired right/wrong answers (McNemar 1947)."""
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    total = lost + won
    if not total:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return min(1.0, 2 * tail)


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(pairs: Sequence[tuple[float, float, float, float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference of two pooled means, resampling samples.

    :param pairs: (sum, count, other sum, other count) a sample: the difference is Σother/Σcount − Σsum/Σcount.
    """
    draw = random.Random(seed)
    n = len(pairs)
    differences = []
    for _ in range(BOOTSTRAP_ROUNDS):
        total = [0.0, 0.0, 0.0, 0.0]
        for _ in range(n):
            row = pairs[int(draw.random() * n)]
            for column in range(4):
                total[column] += row[column]
        differences.append(total[2] / total[3] - total[0] / total[1])
    differences.sort()
    return differences[int(0.025 * BOOTSTRAP_ROUNDS)], differences[int(0.975 * BOOTSTRAP_ROUNDS) - 1]
