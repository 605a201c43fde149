"""FLOPs, bytes and memory of each call on one device, as expressions.

Bytes are those that the generated kernels move when each reads its inputs and writes its outputs once.
tests/tools/test_cost.py checks that the sums are within 10 % of the compiler's count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from sympy import And, Expr, Integer, Max, Mod, Ne, Piecewise, ceiling, log, sympify

from flexdma.lowerings.gate_gradient import COLUMNS
from flexdma.tools.cost_model import symbols
from flexdma.tools.cost_model.kernel_bytes import BYTES, PEAKS
from flexdma.tools.cost_model.packed_blocks import (
    GROUP,
    key_blocks,
    periods,
    places,
    row_blocks,
    row_blocks_of_a_period,
)
from flexdma.tools.cost_model.pairs import shown_pairs
from flexdma.tools.cost_model.symbols import B, D, Dv, Hkv, Hq, N, element, gate_element, ranks, rho, slots

ROUNDS_END = 2**21  # keys; below, ranking resolves two bits per round, from there on one
# Bytes per row (a query of one head), float32.  Forward: its log-sum-exp and largest logit, and its reference, written and
# read; in training also another copy of the log-sum-exp.  Backward: the sums dO_i . o_i and D_i, written and read, and
# log-sum-exp and reference for two kernels each.
PER_ROW, TRAINING_PER_ROW, BACKWARD_PER_ROW = 16, 28, 32
NOTHING = Integer(0)
# Rows of several query heads are by position, which copies them, where blocks do not divide the length (`FoldedRows.of`).
BY_POSITION = And(GROUP > 1, Ne(Mod(N, symbols.rows), 0))


@dataclass(frozen=True)
class Cost:
    """The cost of one call on one device, as expressions in the symbols of `symbols.py`.

    flops: executed on visited blocks; at rho = 1 those of the pairs that the mask shows.
    bytes: moved in the device's memory, if each kernel reads its inputs and writes its outputs once.
    metadata: bytes of order, lifespans and block metadata, kept to the end of the call or of its backward.
    peak: bytes at once beyond inputs and outputs, metadata included.
    received: bytes from other ranks.
    """

    flops: Expr
    bytes: Expr
    metadata: Expr
    peak: Expr
    received: Expr = NOTHING

    def at(self, **sizes: float) -> dict[str, float]:
        """Every field as a number; `sizes` by symbol: B=1, Hq=16, ...

        Raises ValueError naming a size that is missing or unknown.
        """
        return {field.name: evaluated(getattr(self, field.name), sizes) for field in fields(self)}


def evaluated(formula: Expr, sizes: Mapping[str, float]) -> float:
    """A formula as a number; sizes and errors as of `Cost.at`."""
    unknown = sizes.keys() - symbols.MEANING.keys()
    if unknown:
        raise ValueError(f"sizes: expected some of {', '.join(symbols.MEANING)}, got {', '.join(sorted(unknown))}")
    values = {symbol: sympify(sizes[symbol.name]) for symbol in (*symbols.SYMBOLS, rho) if symbol.name in sizes}
    value = formula.xreplace(values)  # subs takes seconds: it simplifies after each symbol
    if value.free_symbols:
        missing = sorted(f"{s.name} ({symbols.MEANING[s.name]})" for s in value.free_symbols)
        raise ValueError(f"sizes: expected {', '.join(missing)} too, got {', '.join(sorted(sizes)) or 'none'}")
    return float(value)


def forward(*, training: bool = False) -> Cost:
    """The flex lowering on a whole sequence, Q = K = N.  training: also make the metadata of the backward."""
    query, key, value, output = _tensors()
    folded = _if_folded(query, NOTHING)  # folding copies the query
    unfolded = _if_unfolded(2 * output, NOTHING)
    attention = query + _packed() + output + (TRAINING_PER_ROW if training else PER_ROW) * B * Hq * N
    mean_value = _places() * Dv * element if training else NOTHING
    held = metadata(training=training) + _packed() + folded + _if_unfolded(output, NOTHING)
    phase = "training" if training else "inference"
    lists = PEAKS["lists, place"] * _places() + PEAKS[f"{phase} lists, tile"] * _tiles()
    return Cost(
        flops=2 * (D + Dv) * _computed_pairs(),
        bytes=2 * folded + unfolded + key + value + _packed() + attention + mean_value + _ranking() + _packing(phase),
        metadata=metadata(training=training),
        peak=Max(held, PEAKS["packing, place"] * _places(), lists),
    )


def backward() -> Cost:
    """The backward of `forward(training=True)`.

    FlexAttention's kernel computes scores and their gradients twice, once by rows and once by columns: 4 D + 3 Dv per pair
    instead of 3 D + 2 Dv.  The gate's gradient takes one more pass over keys and queries, with D + 16 per pair, and the
    products of values and their gradients (docs/gate-gradient.md).  The gradients of keys and values are sums over places:
    packed gradients are written and read, then the sums are written.
    """
    query, key, value, output = _tensors()
    rows = 3 * (query + output) + _if_unfolded(2 * query + output, NOTHING)
    bookkeeping = BACKWARD_PER_ROW * B * Hq * N + BYTES["backward, key"] * _keys() + _packing("backward")
    gate = _places() * (D + 2 * Dv) * element + 2 * COLUMNS * element * (B * Hq * N + _places())
    return Cost(
        flops=2 * (4 * D + 3 * Dv + D + COLUMNS) * _computed_pairs(),
        bytes=rows + 3 * _packed() + key + value + gate + bookkeeping,
        metadata=metadata(training=True),
        peak=metadata(training=True) + 2 * _packed() + _if_unfolded(2 * query + output, query),
    )


def decode() -> Cost:
    """One new token per row of the batch against a `DynamicMaskState` of `slots` keys, for any context length.

    A state is a value, so the new one is written beside the old one.
    """
    keys = B * Hkv * slots
    state = keys * ((D + Dv) * element + gate_element + 8)
    return Cost(
        flops=2 * B * Hq * slots * (D + Dv),
        bytes=keys * (BYTES["decode, byte"] * (D + Dv) * element + BYTES["decode, key"]),
        metadata=keys * (gate_element + 8),
        peak=state,
    )


def full_attention() -> Cost:
    """The forward of causal attention to all keys, for comparison.  Each rank receives all keys of the others."""
    query, key, value, output = _tensors()
    return Cost(
        flops=2 * (D + Dv) * B * Hq * shown_pairs(N, N) / ranks,
        bytes=(query + output) / ranks + key + value,
        metadata=NOTHING,
        peak=(key + value) * (1 - 1 / ranks),
        received=(key + value) * (1 - 1 / ranks),
    )


def metadata(*, training: bool) -> Expr:
    """Bytes of the packed keys' order and lifespans, and of the block index.

    In training also of the pieces of each key and of the transposed block index.
    """
    by_row = row_blocks() * (1 + key_blocks())
    by_key = periods() * key_blocks() * (1 + row_blocks_of_a_period())
    if training:
        return 16 * _places() + 4 * B * Hkv * (N + 1) + 8 * B * Hkv * (by_row + by_key)
    return 12 * _places() + 8 * B * Hkv * by_row


def _computed_pairs() -> Expr:
    return B * Hq * rho * shown_pairs()


def _tensors() -> tuple[Expr, Expr, Expr, Expr]:
    """Bytes of query, key, value and output."""
    return B * Hq * N * D * element, B * Hkv * N * D * element, B * Hkv * N * Dv * element, B * Hq * N * Dv * element


def _packed() -> Expr:
    """Bytes of packed keys and values."""
    return _places() * (D + Dv) * element


def _ranking() -> Expr:
    by_digit, by_bit = BYTES["round of two bits, key"], BYTES["round of one bit, key"]
    return _keys() * Piecewise((by_digit * ceiling(log(N, 4)), N < ROUNDS_END), (by_bit * ceiling(log(N, 2)), True))


def _packing(phase: str) -> Expr:
    return BYTES[f"{phase}, place"] * _places() + BYTES[f"{phase}, tile"] * _tiles()


def _keys() -> Expr:
    return B * Hkv * N


def _places() -> Expr:
    return B * Hkv * places()


def _tiles() -> Expr:
    return B * Hkv * periods() * key_blocks() * row_blocks_of_a_period()


def _if_folded(folded: Expr, alone: Expr) -> Expr:
    """`folded` where folding G query heads into rows copies them; `alone` for G = 1, and for rows by head."""
    return Piecewise((folded, BY_POSITION), (alone, True))


def _if_unfolded(unfolded: Expr, alone: Expr) -> Expr:
    """`unfolded` where unfolding rows of outputs and gradients copies them; `alone` where it is a view."""
    return Piecewise((unfolded, And(BY_POSITION, Hkv > 1)), (alone, True))
