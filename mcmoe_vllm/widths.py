"""How widths are counted: gate and up of an expert share one, down has its own.

A pair is (width of gate and up, width of down), as the groups w13 and w2 of the file store them;
0 drops the expert. The three matrices have equally many weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

Pair = tuple[int, int]

SCALE_BITS = 16  # of a group of columns: its scale and zero in one word


def candidate_bits() -> tuple[int, ...]:
    """Widths that a plan may hold: 0, which drops an expert, and those of the formats."""
    from mcmoe_kernels.formats import FORMATS

    return (0, *sorted(FORMATS))


def code_bits(width: int) -> int:
    """Bits of a code: those of the format that a width names, which is its number."""
    from mcmoe_kernels.formats.format import find

    return find(width).width if width else 0


def matrix_widths(pair: Pair) -> tuple[int, int, int]:
    """The widths of gate, up and down."""
    w13, w2 = pair
    return w13, w13, w2


def average_width(pairs: Iterable[Pair]) -> float:
    """Bits per expert weight, codes alone, as the paper counts them."""
    bits = [code_bits(width) for pair in pairs for width in matrix_widths(pair)]
    return sum(bits) / len(bits)


def count_matrices(pairs: Iterable[Pair]) -> dict[int, int]:
    """How many whole matrices have each width that occurs, narrowest first."""
    counts = Counter(width for pair in pairs for width in matrix_widths(pair))
    return dict(sorted(counts.items()))


def group_words(pair: Pair, group_size: int, group_size_w2: int | None = None) -> int:
    """Words of 16 bits that a group of columns takes in a row of all three matrices; as many
    columns as the larger group has where their sizes differ.

    group_size: of gate and up, and of down unless `group_size_w2` says otherwise.
    """
    sizes = matrix_widths((group_size, group_size_w2 or group_size))
    columns = max(sizes)
    return sum(
        # Codes, and the words of scale and zero.
        code_bits(width) * columns // SCALE_BITS + columns // size
        for width, size in zip(matrix_widths(pair), sizes, strict=True)
        if width
    )


def true_bits(pairs: Iterable[Pair], group_size: int, group_size_w2: int | None = None) -> float:
    """Bits per expert weight with scales and zeros counted; a dropped expert has none.

    group_size: of gate and up, and of down unless `group_size_w2` says otherwise.
    """
    sizes = matrix_widths((group_size, group_size_w2 or group_size))
    bits = [
        code_bits(width) + SCALE_BITS / size if width else 0.0
        for pair in pairs
        for width, size in zip(matrix_widths(pair), sizes, strict=True)
    ]
    return sum(bits) / len(bits)


def bits_per_weight(nbytes: int, weights: int) -> float:
    """True bits of something stored: everything that its bytes hold is counted."""
    return 8 * nbytes / weights


def describe_group_sizes(sizes: Mapping[str, int]) -> str:
    """'w13 128, w2 64, dense 128'."""
    return ", ".join(f"{kind} {size}" for kind, size in sizes.items())


def in_words(width: int) -> str:
    """1 -> '1 bit', 2 -> '2 bits'."""
    return f"{width} bit{'' if width == 1 else 's'}"
