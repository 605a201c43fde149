"""A sequence divided over ranks: the costs of one rank's share by DMA's prefix scan, by ring attention and by Ulysses.

The two ways to attend to all keys are taken at their best: causal work is balanced over ranks (arXiv 2311.09431), keys and
values are read once, and one block is computed while the next arrives.
"""

from sympy import Eq, Expr, Max, Mod, Piecewise, Symbol, ceiling, log

from flexdma.tools.cost_model import symbols
from flexdma.tools.cost_model.calls import NOTHING, Cost, backward, forward, metadata
from flexdma.tools.cost_model.pairs import shown_pairs
from flexdma.tools.cost_model.symbols import B, D, Dv, Hkv, Hq, N, element, gate_element, ranks, slots, w

FLOAT = 4  # bytes; gradients that several ranks add to are float32


def context_parallel(*, training: bool = False) -> Cost:
    """DMA by a prefix scan of bounded states, as in `flexdma.distributed`.

    A rank computes N / ranks queries.  Of earlier ranks it needs only the state after them, `slots` keys per KV head.
    Joining two states is associative, so ceil(log2 ranks) messages of one state reach every rank.  In training the
    gradients of those keys return the same way.
    """
    calls = [forward(training=training), *([backward()] if training else [])]
    state = message()
    rounds = ceiling(log(ranks, 2))
    return Cost(
        # Every query sees w keys, also the first queries of a share, except on the first rank.
        flops=sum((call.flops for call in calls), NOTHING).subs(shown_pairs(), N * w).subs(N, N / ranks),
        bytes=_of_share(sum((call.bytes for call in calls), NOTHING)) + 3 * rounds * state,
        metadata=_of_share(metadata(training=training)),
        peak=_of_share(Max(*(call.peak for call in calls))) + 2 * state,
        received=rounds * (state + (returned_message() if training else NOTHING)),
    )


def _of_share(formula: Expr) -> Expr:
    """A formula of a whole sequence for a rank's share, where the state's keys are counted as if they were tokens too.

    Whether rows are by head depends on the queries alone.
    """
    queries = Symbol("queries", integer=True, positive=True)
    share = formula.xreplace({Mod(N, symbols.rows): Mod(queries, symbols.rows)}).subs({N: N / ranks + slots})
    return share.xreplace({queries: N / ranks})


def message() -> Expr:
    """Bytes of one message of the scan: a `DynamicMaskState`, and per row of the batch whether it is one document."""
    return B * Hkv * slots * ((D + Dv) * element + gate_element + 8) + 24 * B * Hkv + 33 * B


def returned_message() -> Expr:
    """Bytes of one message of the scan's backward: gradients of keys, values, gates, and of sums of forget gates."""
    return B * Hkv * slots * ((D + Dv) * Max(element, FLOAT) + gate_element) + 8 * B * Hkv


def ring_attention(*, training: bool = False) -> Cost:
    """Ring attention (arXiv 2310.01889): keys and values of each rank go around all ranks.

    In the backward they go around again, and their gradients one step further, to the rank where they began.  Gathered
    keys, as in torch's context_parallel, are as many.
    """
    rows, keys = _rows(), B * Hkv * N * (D + Dv) / ranks
    times = 2 if training else 1
    gradients = Piecewise((NOTHING, Eq(ranks, 1)), (ranks * keys * FLOAT, True)) if training else NOTHING
    return Cost(
        flops=_products(training),
        bytes=(3 if training else 1) * rows + times * ranks * keys * element,
        metadata=NOTHING,
        peak=2 * keys * (element + (FLOAT if training else 0)),
        received=times * (ranks - 1) * keys * element + gradients,
    )


def ulysses(*, training: bool = False) -> Cost:
    """DeepSpeed Ulysses (arXiv 2309.14509): an all-to-all gives each rank all tokens of some heads, another one returns them.

    For ranks <= Hq.  Where they are more than Hkv, a KV head goes to several.  The backward exchanges the gradients.
    """
    rows, keys = _rows(), Max(1, Hkv / ranks) * B * N * (D + Dv) * element
    times = 2 if training else 1
    return Cost(
        flops=_products(training),
        bytes=(3 if training else 1) * (rows + keys),
        metadata=NOTHING,
        peak=times * (rows + keys),
        received=times * (rows + keys) * (1 - 1 / ranks),
    )


def held(*, training: bool = False) -> Expr:
    """Bytes of one rank's query, key, value and output, in training with their gradients."""
    return (2 if training else 1) * (_rows() + B * Hkv * N * (D + Dv) * element / ranks)


def _rows() -> Expr:
    """Bytes of one rank's query and output."""
    return B * Hq * N * (D + Dv) * element / ranks


def _products(training: bool) -> Expr:
    """FLOPs of attention to all keys; FlashAttention's backward (arXiv 2307.08691) computes the scores again."""
    return 2 * (4 * D + 3 * Dv if training else D + Dv) * B * Hq * shown_pairs(N, N) / ranks
