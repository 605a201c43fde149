"""Dynamic Mask Attention (arXiv 2508.02124) over sequences packed into one row, in flash-attention's varlen layout.

The row is attended to as one row of documents, so blocks of queries span sequences and no padding is computed.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from flexdma import checks
from flexdma.lifespans import Selection
from flexdma.lowerings.attend import attend
from flexdma.mixed_precision import autocast
from flexdma.opaque import realize
from flexdma.sequences import Sequences, packed_sequences
from flexdma.signatures import ScoreMod, VarlenOptions
from flexdma.state import DynamicMaskState
from flexdma.state.carry import of_heads
from flexdma.state.packed import states_after
from flexdma.transforms import can_read, refuse_jit_trace


@overload
def dynamic_mask_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor,
    *,
    window_size: int | Sequence[int] | None,
    return_state: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...


@overload
def dynamic_mask_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor,
    *,
    window_size: int | Sequence[int] | None,
    return_state: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, DynamicMaskState]: ...


@overload
def dynamic_mask_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor,
    *,
    window_size: int | Sequence[int] | None,
    return_state: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, DynamicMaskState]: ...


def dynamic_mask_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor,
    *,
    window_size: int | Sequence[int] | None,
    selection: str = "causal",
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    bias: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    return_state: bool = False,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor | tuple[Tensor, DynamicMaskState]:
    """`dynamic_mask_attention` of each of S sequences alone, packed into one row of T tokens without padding.

    query: [T, Hq, D]; key: [T, Hkv, D], value: [T, Hkv, Dv], of query's dtype; Hkv divides Hq.
    gate: [T, Hkv] or [T, 1], any float dtype, as in `dynamic_mask_attention`; None = no gates.
    bias: [T, Hkv] or [T, 1], as in `dynamic_mask_attention`.
    cu_seqlens: [S + 1] int32 or int64: 0, then the end of each sequence, the last one T.  Sequences may be empty.
        flash-attention's cu_seqlens_q and cu_seqlens_k are equal here, and its max_seqlen is not needed.
    score_mod: called as for a batch of S sequences: b is the number of the sequence, and positions begin at 0 in each.
    return_state: return (output, DynamicMaskState of batch size S after the last token of each sequence), with which
        `dynamic_mask_attention(..., state=...)` continues all sequences.
    window_size and the other options: as in `dynamic_mask_attention`.

        cu_seqlens = [0, 2, 2, 5]       sequence 0: tokens 0 1
                                        sequence 1: none
                                        sequence 2: tokens 2 3 4

    Returns [T, Hq, Dv], contiguous, in query's dtype, or (that, DynamicMaskState).  A query that sees no key gives 0.
    Differentiable as `dynamic_mask_attention`, which has the same rules for autocast and torch.func.
    Raises ValueError or TypeError naming the argument.  The numbers in cu_seqlens are checked on a CPU outside of
    torch.compile; elsewhere wrong numbers give wrong sequences.
    O(T log T + T w) time for any lengths: lowerings get views of one row, and their blocks of queries span sequences.  On a
    CPU outside of torch.compile the longest sequence also bounds the keys of a block.
    The layout is that of flash-attention's `flash_attn_varlen_func` (arXiv 2307.08691).
    """
    refuse_jit_trace()
    query, key, value = autocast(query, key, value)
    query, key, value, given, bias = _as_one_row(query, key, value, gate, bias)
    checks.one_of("selection", selection, checks.SELECTIONS)
    checks.attention_arguments(query, key, value)
    checks.gate(given, key, selection)
    if bias is not None:
        checks.bias("bias", bias, key)
    checks.scores(scale, score_mod)
    checks.sink_logits(sink_logits, query)
    policy = Selection.of(
        selection, window_size, sinks, recent, heads=key.shape[1] if given is None else given.shape[1]
    )
    checks.sinks_without_recent(sink_logits, selection, recent)
    sequences = packed_sequences(cu_seqlens, key.shape[2], query)
    gate = policy.gates(given, key)
    added = None if given is None else gate
    if return_state:
        policy.refuse_without_state()
        policy.refuse_without_bound("with return_state of packed sequences")
        gate = of_heads(gate, key)
        bias = None if bias is None else of_heads(bias, key)
    lifespans = policy.lifespans(gate, document_ids=sequences.number[None])
    output = attend(
        query, key, value, added, lifespans, bias=bias, in_order=True, ranked=policy.is_ranked, best_stays=policy.best_stays,
        capacity=capacity_of_sequences(policy, sequences, lowering), scale=scale,
        score_mod=None if score_mod is None else score_mod_in_sequences(score_mod, sequences), lowering=lowering,
        block_size=block_size, kernel_options=kernel_options, sink_logits=sink_logits,
    )  # fmt: skip
    output = output[0].transpose(0, 1).contiguous()
    return (output, states_after(key, value, gate, lifespans, sequences, policy, bias)) if return_state else output


def _as_one_row(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """[T, H, ...] -> views [1, H, T, ...].  Checks shapes, so that errors name those of the caller."""
    tokens, _heads, size = checks.tensor("query", query, ("T", "Hq", "D")).shape
    heads = checks.tensor("key", key, (tokens, "Hkv", size), query).shape[1]
    checks.tensor("value", value, (tokens, heads, "Dv"), query)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))

    def row(name: str, numbers: Tensor | None) -> Tensor | None:
        if numbers is None:
            return None
        shared = isinstance(numbers, Tensor) and numbers.dim() == 2 and numbers.shape[1] == 1
        return checks.tensor(name, numbers, (tokens, 1 if shared else heads), query).transpose(0, 1)[None]

    return query, key, value, row("gate", gate), row("bias", bias)


def capacity_of_sequences(policy: Selection, sequences: Sequences, lowering: str | None) -> int | None:
    """Upper bound on the keys that one query sees; None = no bound.

    The longest sequence is one too.  It is read on a CPU only, where this does not synchronise, and not for "flex", which
    compiles once per bound.
    """
    if sequences.number.device.type != "cpu" or not can_read(sequences.number) or lowering == "flex":
        return policy.capacity
    longest = int(sequences.cu_seqlens.diff().max())
    return longest if policy.capacity is None else min(longest, policy.capacity)


def score_mod_in_sequences(score_mod: ScoreMod, sequences: Sequences) -> ScoreMod:
    """A score_mod that maps positions of the row to sequences and positions in them, and calls `score_mod`."""
    # Buffers, because Inductor's C++ FlexAttention captures no views and no expressions.
    number, start = realize(sequences.number), realize(sequences.start)

    def in_sequence(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, number[i], h, i - start[i], j - start[j])

    return in_sequence
