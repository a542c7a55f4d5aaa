"""Intervals and tests against textbook values and scipy-free enumeration."""

import math
import random

import pytest

from optkit import stats


def test_ten_values_are_covered_by_ranks_two_and_nine():
    interval = stats.order_statistic_interval([float(value) for value in range(1, 11)])
    assert (interval.low, interval.high, interval.value, interval.n) == (2.0, 9.0, 5.5, 10)
    assert interval.coverage == pytest.approx(1 - 2 * 11 / 1024)  # David & Nagaraja: (1 + 10)/2^10 in each tail


def test_six_values_need_their_extremes_and_five_do_not_reach_95_percent():
    assert stats.order_statistic_interval([3, 1, 2, 6, 5, 4]).coverage == pytest.approx(1 - 2 / 64)
    assert stats.order_statistic_interval([3, 1, 2, 5, 4]).coverage < 0.95


def test_coverage_is_what_simulation_finds():
    draw = random.Random(1)
    hits = 0
    for _ in range(4000):
        interval = stats.order_statistic_interval([draw.gauss(0, 1) ** 3 for _ in range(10)])
        hits += interval.low <= 0 <= interval.high
    assert hits / 4000 == pytest.approx(0.979, abs=0.01)


def test_equal_arms_differ_in_few_of_many_comparisons():
    draw = random.Random(2)
    claims = 0
    for _ in range(1000):
        first = [math.exp(draw.gauss(0, 0.05)) for _ in range(6)]
        second = [math.exp(draw.gauss(0, 0.05)) for _ in range(6)]
        claims += stats.speed_up(first, second).differs
    assert claims / 1000 <= 0.05


def test_a_planted_gain_is_found_and_noise_above_it_hides_it():
    first = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
    second = [value / 1.5 for value in first]
    found = stats.speed_up(first, second)
    assert found.ratio == pytest.approx(1.5)
    assert found.differs
    assert not stats.speed_up(first, second, noise=0.5).differs


def test_an_effect_below_two_percent_is_not_claimed_however_exact():
    assert not stats.speed_up([1.01] * 10, [1.0] * 10).differs


def test_fewer_pairs_than_95_percent_needs_claim_nothing():
    for n in range(1, 6):
        assert not stats.speed_up([2.0] * n, [1.0] * n).differs
    assert stats.speed_up([2.0] * 6, [1.0] * 6).differs


def test_mcnemar_equals_the_exact_binomial():
    first = [True] * 9 + [False] * 1
    second = [False] * 8 + [True] * 2
    # 8 lost, 1 won: 2·(C(9,0) + C(9,1)) / 2^9
    assert stats.mcnemar(first, second) == pytest.approx(2 * (1 + 9) / 512)
    assert stats.mcnemar([True, False], [True, False]) == 1.0


def test_wilson_interval_of_a_published_example():
    low, high = stats.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert low == pytest.approx(0.2553, abs=5e-4)
    assert high == pytest.approx(0.3662, abs=5e-4)


def test_paired_bootstrap_covers_the_true_difference_and_excludes_zero_when_it_is_large():
    draw = random.Random(3)
    pairs = [(draw.gauss(10, 1), 5.0, draw.gauss(12, 1), 5.0) for _ in range(200)]
    low, high = stats.paired_bootstrap(pairs)
    assert low <= 0.4 <= high
    assert low > 0
