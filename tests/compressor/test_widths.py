"""Widths are counted in one way: by whole matrices, of which gate and up share a width."""

import pytest

from mcmoe_kernels.formats import packing
from mcmoe_vllm.widths import (
    average_width,
    bits_per_weight,
    count_matrices,
    group_words,
    in_words,
    true_bits,
)

PAIRS = [(1, 4), (2, 2), (0, 0), (3, 1)]


def test_an_experts_width_is_that_of_three_matrices():
    assert average_width([(1, 4)]) == 2.0  # not 2.5: gate and up are two
    assert average_width(PAIRS) == (1 + 1 + 4 + 3 * 2 + 3 * 0 + 3 + 3 + 1) / 12


def test_matrices_are_whole_and_ordered_by_width():
    assert list(count_matrices(PAIRS).items()) == [(0, 3), (1, 3), (2, 3), (3, 2), (4, 1)]
    assert count_matrices(iter(PAIRS)) == count_matrices(PAIRS)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_true_bits_are_those_of_the_bytes(group_size):
    """packed_bytes is the format's own count; a dropped expert has neither codes nor scales."""
    rows, columns = 64, 256
    nbytes = sum(
        2 * packing.packed_bytes(rows, columns, w13, group_size)
        + packing.packed_bytes(columns, rows * 2, w2, group_size) // 2
        for w13, w2 in PAIRS
    )
    weights = 3 * len(PAIRS) * rows * columns
    assert true_bits(PAIRS, group_size) == pytest.approx(bits_per_weight(nbytes, weights))
    words = sum(group_words(pair, group_size) for pair in PAIRS)
    assert true_bits(PAIRS, group_size) == pytest.approx(16 * words / (3 * len(PAIRS) * group_size))


def test_groups_of_down_may_have_another_size():
    # In 64 columns: 8 words of codes and one of scale and zero, twice; 12 and two.
    assert group_words((2, 3), 64, 32) == 2 * 9 + 14 and group_words((0, 0), 64, 32) == 0
    assert group_words((2, 3), 32, 64) == 2 * 10 + 13
    assert true_bits([(2, 3)], 64, 32) == pytest.approx((2 * (2 + 16 / 64) + 3 + 16 / 32) / 3)


def test_plural():
    assert [in_words(n) for n in (0, 1, 2)] == ["0 bits", "1 bit", "2 bits"]
