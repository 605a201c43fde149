"""Dynamic Mask Attention over a sequence that is divided over ranks: context parallelism.

After any prefix later queries can see only the keys of its running top-w, its sinks and its recent tokens ("Trainable Dynamic
Mask Sparse Attention", arXiv 2508.02124), so this is all that a rank receives.  Ring attention (arXiv 2310.01889) and
gathered keys, as in torch's context_parallel, send all keys to all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from flexdma import checks
from flexdma.attention import dynamic_mask_attention
from flexdma.distributed.agreement import refuse_other_mesh, same_on_all_ranks
from flexdma.distributed.prefix_scan import Tensors, of_earlier_ranks, sum_of_earlier_ranks
from flexdma.lifespans import Selection
from flexdma.mixed_precision import autocast
from flexdma.signatures import ScoreMod, VarlenOptions
from flexdma.state import DynamicMaskState, State
from flexdma.state.carry import of_heads
from flexdma.state.joined import Run, empty_run, joined, run_of
from flexdma.transforms import is_transformed, needs_gradient


@overload
def context_parallel_dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    mesh: DeviceMesh,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_state: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...


@overload
def context_parallel_dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    mesh: DeviceMesh,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_state: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, State]: ...


@overload
def context_parallel_dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    mesh: DeviceMesh,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_state: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, State]: ...


def context_parallel_dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    mesh: DeviceMesh,
    selection: str = "causal",
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    bias: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_state: bool = False,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """`dynamic_mask_attention` of a sequence whose tokens are divided over the ranks of a mesh, in order.

    Every tensor is this rank's part: rank 0 has the first n tokens, rank 1 the next, and so on.  n >= 1 may differ between
    ranks; other sizes, dtypes and options may not.

    query: [B, Hq, n, D], key: [B, Hkv, n, D], value: [B, Hkv, n, Dv], gate: [B, Hkv, n] or [B, 1, n].
    mesh: of one dimension, the ranks in order of the sequence; mesh["cp"] of a larger one.
    key_padding_mask, document_ids: [B, n].  A document may span ranks: equal ids on both sides of a border are one document.
    bias: [B, Hkv, n] or [B, 1, n].  score_mod: gets positions in the whole sequence.
    return_state: return (output, state after this rank's tokens); that of the last rank belongs to the whole sequence.
        `crop` goes back to this rank's first token at most.
    Others as in `dynamic_mask_attention`; selection is "causal", "threshold" or "sliding", and window_size an int or one per
        gate head.

    Returns [B, Hq, n, Dv], in query's dtype, or (that, DynamicMaskState).  Equals the call over the whole sequence.
    Differentiable as `dynamic_mask_attention`: gradients of received keys go back to their ranks.  Tensors that all ranks
    have, as parameters and sink_logits, get this rank's part of their gradient; sum it over the mesh.  All ranks of the mesh
    must call it, and its backward, in the same order; a rank that does not ends the others after the process group's timeout.

    Raises ValueError or TypeError naming the argument; also where options, sizes or dtypes differ between ranks.  Off a CPU
    only the first call with these options is compared.
    Messages: ceil(log2 P) per rank of P, each with C = w + sinks + recent keys per KV head, and as many in the backward;
    the length of the sequence is in none.  Otherwise the time and memory of n queries over C + n keys, and O(C log C log P).
    """
    if is_transformed():
        raise NotImplementedError(
            "torch.func: expected a call outside of its transformations, as they send no messages"
        )
    query, key, value = autocast(query, key, value)
    checks.attention_arguments(query, key, value)
    checks.one_of("selection", selection, checks.SELECTIONS)
    checks.gate(gate, key, selection)
    if bias is not None:
        checks.bias("bias", bias, key)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query: expected {key.shape[2]} positions as key has, got {query.shape[2]}")
    policy = Selection.of(selection, window_size, sinks, recent, heads=key.shape[1] if gate is None else gate.shape[1])
    policy.refuse_without_bound("over several ranks")
    gate = policy.gates(gate, key)
    refuse_other_mesh(mesh, query=query, key=key, value=value, gate=gate)
    gate = of_heads(gate, key)
    bias = None if bias is None else of_heads(bias, key)
    checks.selected_keys(gate, key_padding_mask, document_ids)
    before = None
    if mesh.size() > 1:
        options = {
            "selection": selection, "window_size": policy.window_size, "sinks": sinks, "recent": recent, "scale": scale,
            "key.dtype": key.dtype, "gate.dtype": gate.dtype, "bias.dtype": None if bias is None else bias.dtype,
            "document_ids is None": document_ids is None,
            "key, value, gate or bias requires a gradient": needs_gradient(key, value, gate, bias),
        }  # fmt: skip
        sizes = {
            "key.shape[0]": key.shape[0], "query.shape[1]": query.shape[1], "key.shape[1]": key.shape[1],
            "key.shape[3]": key.shape[3], "value.shape[3]": value.shape[3],
        }  # fmt: skip
        gate = same_on_all_ranks(gate, options, sizes, mesh)
        before = _state_before(key, value, gate, bias, policy, key_padding_mask, document_ids, mesh)
    return dynamic_mask_attention(
        query, key, value, gate, window_size=policy.window_size, selection=selection, scale=scale, score_mod=score_mod,
        bias=bias, sinks=sinks, recent=recent, key_padding_mask=key_padding_mask, document_ids=document_ids, state=before,
        return_state=return_state, lowering=lowering, block_size=block_size, kernel_options=kernel_options,
        sink_logits=sink_logits,
    )  # fmt: skip


def _state_before(
    key: Tensor, value: Tensor, gate: Tensor, bias: Tensor | None, policy: Selection, key_padding_mask: Tensor | None,
    document_ids: Tensor | None, mesh: DeviceMesh,
) -> DynamicMaskState:  # fmt: skip
    """The state after the tokens of all earlier ranks."""
    own = run_of(key, value, gate, policy, key_padding_mask, document_ids, bias)
    none = empty_run(key, value, gate, policy, bias)

    def as_run(tensors: Tensors) -> Run:
        *of_state, one_document = tensors
        named: dict[str, Any] = dict(zip(own.state.tensors(), of_state, strict=True))
        return Run(replace(own.state, **named), one_document.bool())

    def join(first: Tensors, second: Tensors) -> Tensors:
        return _tensors(joined(as_run(first), as_run(second)))

    return as_run(of_earlier_ranks(_tensors(own), _tensors(none), join, mesh)).state


def _tensors(run: Run) -> Tensors:
    # As numbers, because Inductor's C++ cannot view a bool as bytes.
    return (*run.state.tensors().values(), run.one_document.to(torch.uint8))


def shard_positions(tokens: int, mesh: DeviceMesh, device: torch.device | str | None = None) -> Tensor:
    """[tokens] int64: the positions of this rank's tokens in the whole sequence, as for rotary embeddings.

    tokens: n, of this rank; may differ between ranks.  device: default that of the mesh.
    All ranks of the mesh must call it.
    """
    checks.positive_int("tokens", tokens, 0)
    number = torch.full((), tokens, device=mesh.device_type if device is None else device)
    refuse_other_mesh(mesh, tokens=number)
    return sum_of_earlier_ranks(number, mesh) + torch.arange(tokens, device=number.device)
