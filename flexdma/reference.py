"""The specification: Dynamic Mask Attention (arXiv 2508.02124) as its definition, in O(Q K) memory.

The tests compare every lowering with it, in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.signatures import Biases, Intervals, ScoreMod, modified_scores


def dense_visibility(
    gate: Tensor, *, window_size: int | Sequence[int] | None, selection: str = "causal", sinks: int = 0, recent: int = 0,
    key_padding_mask: Tensor | None = None, document_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, K, K] bool: whether query i (second to last dimension) sees key j.

    Arguments as in `flexdma.dynamic_mask_attention`.
    """
    checks.selected_keys(gate, key_padding_mask, document_ids)
    windows = checks.windows(window_size, gate.shape[1], needed=selection not in ("threshold", "full"))
    checks.positive_int("sinks", sinks, 0)
    checks.positive_int("recent", recent, 0)
    gate = gate.detach() if gate.dtype == torch.float64 else gate.detach().float()
    i, j = (torch.arange(gate.shape[-1], device=gate.device).view(shape) for shape in ((-1, 1), (1, -1)))
    real = gate != -torch.inf
    if key_padding_mask is not None:
        real = real & key_padding_mask[:, None]
    together = torch.ones_like(i >= j)[None, None]
    if document_ids is not None:
        document = (document_ids[:, 1:] != document_ids[:, :-1]).cumsum(-1)
        document = torch.nn.functional.pad(document, (1, 0))[:, None]
        together = document[..., :, None] == document[..., None, :]
    same = together & real[..., None, :]
    allowed = (j <= i) & same
    is_sink = (allowed.sum(-1) <= sinks)[..., None, :]
    is_recent = i - j < recent
    # Those that the top-w of query i chooses from: all keys of a document for a choice that its queries share.
    others = ~is_sink & (same if selection == "global" else allowed & ~is_recent)
    if selection == "threshold":
        others = others & ~(gate <= 0)[..., None, :]

    # better[k, j]: key k outranks key j.  NaN is the largest of all numbers; of equal gates the newer ranks higher.
    a, b = gate[..., :, None], gate[..., None, :]
    equal = (a == b) | (a.isnan() & b.isnan())
    better = (a > b) | (a.isnan() & ~b.isnan()) | (equal & (i > j))
    # [i, j]: how many of the others outrank key j.  Float32 counts to 2^24.
    rank = i - j - recent if selection in ("sliding", "full") else others.float() @ better.float()
    window = torch.tensor(windows or [gate.shape[-1]], device=gate.device).view(-1, 1, 1)
    return allowed & (is_sink | is_recent | (others & (rank < window)))


def dense_dynamic_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *, window_size: int | Sequence[int] | None,
    selection: str = "causal", scale: float | None = None, score_mod: ScoreMod | None = None, sinks: int = 0, recent: int = 0,
    bias: Tensor | None = None, key_padding_mask: Tensor | None = None, document_ids: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flexdma.dynamic_mask_attention` by its formula.  Same arguments, shapes and result; any floating dtype."""
    checks.attention_arguments(query, key, value)
    checks.one_of("selection", selection, checks.SELECTIONS)
    checks.gate(gate, key, selection)
    gate = key.new_zeros(key.shape[:3]) if gate is None else gate
    added = gate
    if bias is not None:
        checks.bias("bias", bias, key)
        computed = torch.float64 if torch.float64 in (gate.dtype, bias.dtype) else torch.float32
        added = gate.to(computed) + bias.to(computed)
    checks.sink_logits(sink_logits, query)
    checks.sinks_without_recent(sink_logits, selection, recent)
    visible = dense_visibility(gate, window_size=window_size, selection=selection, sinks=sinks, recent=recent,
                               key_padding_mask=key_padding_mask, document_ids=document_ids)  # fmt: skip
    return _dense_attention(query, key, value, visible, added, scale, score_mod, sink_logits)


def dense_lifespan_attention(
    query: Tensor, key: Tensor, value: Tensor, lifespans: Intervals, *, bias: Biases = None,
    scale: float | None = None, score_mod: ScoreMod | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`flexdma.lifespan_attention` by its formula: key j is visible to query i where birth_j <= i < death_j.

    Of several intervals each adds one term to the softmax, where it contains i, with its own bias.
    """
    checks.attention_arguments(query, key, value)
    visible, bias = _dense_intervals(lifespans, bias, key)
    checks.sink_logits(sink_logits, query)
    return _dense_attention(query, key, value, visible, bias, scale, score_mod, sink_logits)


def dense_attention_mass(
    query: Tensor, key: Tensor, lifespans: Intervals | None = None, *, reduction: str = "sum",
    ages: Sequence[tuple[int, int | None]] | None = None, bias: Biases = None,
    scale: float | None = None, score_mod: ScoreMod | None = None,
) -> Tensor:  # fmt: skip
    """`flexdma.attention_mass` by its formula, in float32, or float64 for float64 inputs."""
    checks.attention_arguments(query, key, key)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.ages(ages)
    batch, heads, keys = key.shape[:3]
    query, key = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key))
    i, j = torch.arange(keys, device=key.device)[:, None], torch.arange(keys, device=key.device)
    if lifespans is None:
        lifespans = (j.expand(batch, 1, -1), torch.full_like(j, keys).expand(batch, 1, -1))
    visible, bias = _dense_intervals(lifespans, bias, key)
    each = visible.shape[-1] // keys
    if bias is not None:
        visible = visible & (bias != -torch.inf)[:, :, None]
    weights = _dense_weights(query, key, visible, bias, scale, score_mod, None).unflatten(1, (heads, -1))
    first_query = keys - query.shape[2]

    def mass(counted: Tensor) -> Tensor:
        """counted: [..., K, K] bool, the pairs of query and key."""
        counted = counted.repeat_interleave(each, -1)
        chosen = torch.where((visible & counted)[:, :, None, first_query:], weights, 0.0).flatten(2, 3)
        chosen = chosen.unflatten(-1, (keys, each))
        return chosen.sum((2, -1)) if reduction == "sum" else chosen.amax((2, -1))

    if ages is None:
        return mass(torch.ones_like(j <= i))
    return torch.stack([mass((i - j >= low) & (high is None or i - j < high)) for low, high in ages])


def _dense_intervals(lifespans: Intervals, bias: Biases, key: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whether query i is in an interval of key j, [B, H, K, P K], and the bias of each, [B, H, P K].

    The P intervals of a key are neighbours in the last dimension.
    """
    intervals, biases = checks.intervals(lifespans, bias, key)
    i = torch.arange(key.shape[2], device=key.device)[:, None]
    visible = [(birth[..., None, :] <= i) & (i < death[..., None, :]) for birth, death in intervals]
    added = None
    if any(each is not None for each in biases):
        zero = torch.zeros(1, 1, key.shape[2], dtype=key.dtype, device=key.device)
        added = _neighbours([zero if each is None else each for each in biases])
    return _neighbours(visible), added


def _neighbours(tensors: Sequence[Tensor]) -> Tensor:
    """[..., K] each -> [..., P K]."""
    return torch.stack(torch.broadcast_tensors(*tensors), -1).flatten(-2)


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None,
    score_mod: ScoreMod | None, sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention under a dense mask; see `_dense_weights`."""
    queries, keys = query.shape[2], key.shape[2]
    weights = _dense_weights(query, key, visible, bias, scale, score_mod, sink_logits)
    value = value.repeat_interleave(visible.shape[-1] // keys, 2)
    # 0 * NaN is NaN: a NaN or infinity in a key that no query sees would reach the output through a weight of 0.
    unseen = ~visible[:, :, keys - queries :].any(-2)[..., None]
    value = value.masked_fill(unseen, 0.0)
    return weights.to(value.dtype) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _dense_weights(
    query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None, score_mod: ScoreMod | None,
    sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B, Hq, Q, P K]: the attention of each query to each key under a dense mask.

    visible: [B, H, K, P K] bool, whether query i (second to last dimension) sees key j in each of P intervals.
    bias: [B, H, P K].
    """
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    each = visible.shape[-1] // keys
    key = key.repeat_interleave(each, 2)
    unseen = ~visible[:, :, keys - queries :].any(-2)[..., None]
    key = key.masked_fill(unseen, 0.0)
    bias = torch.zeros(batch, 1, keys * each, dtype=query.dtype, device=query.device) if bias is None else bias

    def per_query_head(t: Tensor) -> Tensor:
        return t.expand(batch, heads, *t.shape[2:]).repeat_interleave(query_heads // heads, 1)

    key, bias, visible = map(per_query_head, (key, bias, visible))
    scores = query @ key.mT * (size**-0.5 if scale is None else scale)
    if score_mod is not None:
        index = [torch.arange(n, device=query.device).view([-1 if d == dim else 1 for d in range(4)])
                 for dim, n in enumerate((batch, query_heads, queries, keys))]  # fmt: skip
        index[2], index[3] = index[2] + keys - queries, index[3].repeat_interleave(each, -1)
        scores = modified_scores(score_mod, scores, *index)
    visible = visible[:, :, keys - queries :]
    scores = (scores + bias[:, :, None, :]).masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.view(-1, 1, 1).expand(batch, query_heads, queries, 1)
        scores = torch.cat([scores - _best_gate(bias[:, :, None, :], visible), sink.to(scores.dtype)], -1)
    # A query that sees no key gives 0, and gradient 0.
    nothing = (scores[..., : keys * each] == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return weights[..., : keys * each]


def _best_gate(gate: Tensor, visible: Tensor) -> Tensor:
    """[B, H, Q, 1]: the largest finite gate that each query sees, of equal ones the newer; 0 if it sees none."""
    seen = torch.where(visible & gate.isfinite(), gate, -torch.inf)
    best = seen.detach().amax(-1, keepdim=True)
    newest = torch.where(seen == best, torch.arange(seen.shape[-1], device=seen.device), -1).argmax(-1, keepdim=True)
    return torch.where(best == -torch.inf, 0.0, seen.gather(-1, newest))
