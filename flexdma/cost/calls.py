"""FLOPs, bytes, memory and communication of each call, as expressions.

Bytes are those that the generated kernels move when each reads its inputs and writes its outputs once.  The numbers per key
and per pair of blocks below are Inductor's own count for the kernels it generates for sm_90; tests/test_cost.py has the
compiler count again, at other sizes, and holds the sums to 10 %.
"""

from dataclasses import dataclass, fields

from sympy import Expr, Integer, Max, Piecewise, ceiling, log

from flexdma.cost import symbols
from flexdma.cost.blocks import GROUP, entries_per_row_block, key_blocks, row_blocks, shown_pairs
from flexdma.cost.symbols import B, D, Dv, Hkv, Hq, N, element, gate_element, ranks, rho, slots, w

# Bytes per key of lifespans' rest, reference gates, packing and what the mods capture; and per key and round of ranking:
# two bits a round up to 2^21 keys, one above.
PER_KEY, ROUNDS_END = 207, 2**21
PER_ROUND_OF_TWO_BITS, PER_ROUND_OF_ONE = 40, 44
# Bytes per pair of a row block and a key block: building the metadata, without and with its transposed half.
PER_BLOCK_PAIR = {False: 42, True: 72}
# Bytes per entry of the row blocks' index tensors: building them, and reading them in the kernel.
PER_ENTRY, READ_PER_ENTRY = 24, 8
# The most that building holds at once, operator by operator, as PyTorch's allocator counts it; and per key.
PEAK_PER_BLOCK_PAIR, PEAK_PER_KEY = {False: 23, True: 31}, 33
# Bytes per row (a query of one head): forward, the logarithm of its sum; backward, that, and D_i = dO_i . o_i twice.
PER_ROW, BACKWARD_PER_ROW = 4, 12
BACKWARD_PER_KEY, BACKWARD_PER_BLOCK_PAIR = 41, 8
# Decoding, per number of the state's keys and values in units of its bytes, and per key besides.  Inductor counts a slot
# that is overwritten as the whole buffer, so that this is too much by up to 4 of the 10.
DECODE, DECODE_PER_KEY = 10, 144
NOTHING = Integer(0)


@dataclass(frozen=True)
class Cost:
    """Of one call on one device; expressions in the symbols of flexdma.cost.symbols.

    flops: executed, on visited blocks; at rho = 1 those of the pairs that the mask shows.
    bytes: moved in the device's memory, if each kernel reads its inputs and writes its outputs once.
    metadata: bytes of order, lifespans and block metadata, which live until the call, or its backward, is done.
    peak: bytes held at once beyond inputs and outputs, metadata included.
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
        unknown = sizes.keys() - symbols.MEANING.keys()
        if unknown:
            raise ValueError(f"sizes: expected some of {', '.join(symbols.MEANING)}, got {', '.join(sorted(unknown))}")
        values = {symbol: sizes[symbol.name] for symbol in (*symbols.SYMBOLS, rho) if symbol.name in sizes}
        numbers = {}
        for field in fields(self):
            value = getattr(self, field.name).subs(values)
            if value.free_symbols:
                missing = sorted(f"{s.name} ({symbols.MEANING[s.name]})" for s in value.free_symbols)
                raise ValueError(f"sizes: expected {', '.join(missing)} too")
            numbers[field.name] = float(value)
        return numbers


def forward(*, training: bool = False) -> Cost:
    """The flex lowering on a whole sequence, Q = K = N; `training`: with what the backward needs."""
    query, key, value, output = _tensors()
    folded = _if_grouped(4 * query, 2 * query)
    unfolded = _if_grouped(2 * output, Integer(0))
    packing = 2 * (key + value)
    attention = query + key + value + output + PER_ROW * B * Hq * N + READ_PER_ENTRY * _entries()
    held = metadata(training=training) + key + value + query
    return Cost(
        flops=2 * B * Hq * rho * shown_pairs() * (D + Dv),
        bytes=folded + unfolded + packing + attention + _bookkeeping(training),
        metadata=metadata(training=training),
        peak=Max(held, PEAK_PER_BLOCK_PAIR[training] * _block_pairs() + PEAK_PER_KEY * B * Hkv * N + 8 * _entries()),
    )


def backward() -> Cost:
    """The backward of `forward(training=True)`.

    FlexAttention's kernel computes scores and their gradients twice, once by rows and once by columns: 4 D + 3 Dv per pair,
    where 3 D + 2 Dv would do.  The gate's gradient is a column of sums and adds no product.
    """
    query, key, value, output = _tensors()
    rows = _if_grouped(3 * (query + output), 2 * query + 3 * output)
    bookkeeping = BACKWARD_PER_ROW * B * Hq * N + BACKWARD_PER_KEY * B * Hkv * N + READ_PER_ENTRY * _entries()
    bookkeeping += BACKWARD_PER_BLOCK_PAIR * _block_pairs()
    return Cost(
        flops=2 * B * Hq * rho * shown_pairs() * (4 * D + 3 * Dv),
        bytes=rows + 4 * (key + value) + bookkeeping,
        metadata=metadata(training=True),
        peak=metadata(training=True) + 2 * (query + output) + 2 * (key + value),
    )


def decode() -> Cost:
    """One new token per row of the batch against a `DynamicMaskState` of `slots` keys, whatever the context.

    A state is a value: the new one is written beside the old.
    """
    keys = B * Hkv * slots
    state = keys * ((D + Dv) * element + gate_element + 8)
    return Cost(
        flops=2 * B * Hq * slots * (D + Dv),
        bytes=keys * (DECODE * (D + Dv) * element + DECODE_PER_KEY),
        metadata=keys * (gate_element + 8),
        peak=state,
    )


def context_parallel(*, training: bool = False) -> Cost:
    """One rank's share of a sequence over `ranks`, by the scheme of a bounded state; flexdma does not implement it.

    A rank computes N / ranks queries.  All it needs of earlier ranks are the w best of their keys per KV head, the state
    after them; merging two states is associative, so ceil(log2 ranks) exchanges of one state each reach every rank.  In
    training the gradients of those keys travel back the same way.
    """
    calls = [forward(training=training), *([backward()] if training else [])]
    share = {N: N / ranks}
    state = B * Hkv * w * ((D + Dv) * element + gate_element + 8)
    returned = B * Hkv * w * ((D + Dv) * element + gate_element) if training else NOTHING
    return Cost(
        # Here every query sees w keys, the first ones of a share too; on the first rank they see fewer.
        flops=sum((call.flops for call in calls), NOTHING).subs(shown_pairs(), N * w).subs(share),
        bytes=sum((call.bytes for call in calls), NOTHING).subs(share) + 3 * state,
        metadata=metadata(training=training).subs(share),
        peak=Max(*(call.peak for call in calls)).subs(share) + 2 * state,
        received=ceiling(log(ranks, 2)) * (state + returned),
    )


def full_attention() -> Cost:
    """The forward of causal attention to everything, for comparison; over ranks each receives all keys of the others."""
    query, key, value, output = _tensors()
    return Cost(
        flops=B * Hq * N * (N + 1) * (D + Dv) / ranks,
        bytes=(query + output) / ranks + key + value,
        metadata=NOTHING,
        peak=(key + value) * (1 - 1 / ranks),
        received=(key + value) * (1 - 1 / ranks),
    )


def metadata(*, training: bool) -> Expr:
    """Bytes of the order of the keys, their packed lifespans, and numbers and indices of the blocks."""
    keys = B * Hkv * N
    inverse = 8 if training else 0
    numbers = 8 * B * Hkv * (row_blocks() + (key_blocks() if training else 0))
    return (8 + 8 + inverse) * keys + numbers + 8 * _entries() + (8 * _block_pairs() if training else 0)


def _tensors() -> tuple[Expr, Expr, Expr, Expr]:
    """Bytes of query, key, value and output."""
    return B * Hq * N * D * element, B * Hkv * N * D * element, B * Hkv * N * Dv * element, B * Hq * N * Dv * element


def _bookkeeping(training: bool) -> Expr:
    ranking = Piecewise(
        (PER_ROUND_OF_TWO_BITS * ceiling(log(N, 4)), N < ROUNDS_END), (PER_ROUND_OF_ONE * ceiling(log(N, 2)), True)
    )
    return B * Hkv * N * (PER_KEY + ranking) + PER_BLOCK_PAIR[training] * _block_pairs() + PER_ENTRY * _entries()


def _entries() -> Expr:
    """Of the row blocks' index tensors."""
    return B * Hkv * row_blocks() * entries_per_row_block()


def _block_pairs() -> Expr:
    return B * Hkv * row_blocks() * key_blocks()


def _if_grouped(grouped: Expr, alone: Expr) -> Expr:
    """Folding G query heads into the rows of one moves them; one head is where it should be."""
    return Piecewise((grouped, GROUP > 1), (alone, True))
