"""Rounding up, for ints >= 0 and symbolic ints.

None of them uses -(-n // d): Inductor finds no bounds for it where n is a symbolic size, and fails (torch 2.13).
"""


def ceil_div(numerator: int, denominator: int) -> int:
    """The smallest integer not below the quotient."""
    return (numerator + denominator - 1) // denominator


def round_up(number: int, unit: int) -> int:
    """The smallest multiple of `unit` not below the number."""
    return ceil_div(number, unit) * unit


def power_of_two_from(number: int) -> int:
    """The smallest power of two not below the number, and not below 1."""
    return 1 << max(0, number - 1).bit_length()
