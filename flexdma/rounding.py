"""Rounding up, for ints >= 0 and symbolic ints.

None of them uses -(-n // d): Inductor finds no bounds for it where n is a symbolic size, and fails (torch 2.13).
"""

from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexdma.transforms import is_exporting

# Positions are int32.
MOST_LEVELS = 31


def ceil_div(numerator: int, denominator: int) -> int:
    """The smallest integer not below the quotient."""
    return (numerator + denominator - 1) // denominator


def round_up(number: int, unit: int) -> int:
    """The smallest multiple of `unit` not below the number."""
    return ceil_div(number, unit) * unit


def levels(number: int) -> int:
    """The smallest n with number <= 2^n: the rounds of an algorithm that halves, for up to `number` elements.

    torch.compile guards a symbolic number per power of two.  Under torch.export, which allows no such guard, the result is
    for the largest number that the program accepts: the `max` of its torch.export.Dim, and 2^31 without one.
    """
    exporting = is_exporting()
    n = 0
    while n < MOST_LEVELS and not (statically_known_true(number <= 1 << n) if exporting else number <= 1 << n):
        n += 1
    return n


def power_of_two_from(number: int) -> int:
    """The smallest power of two not below the number, and not below 1."""
    return 1 << max(0, number - 1).bit_length()
