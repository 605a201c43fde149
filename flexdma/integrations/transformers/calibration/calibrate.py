"""Calibrate: convert a model and compute its gates by regression, without a gradient step."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from flexdma import checks
from flexdma.gates import ValueGate
from flexdma.integrations.transformers.calibration.allocation import HeadErrors, windows_of_least_error
from flexdma.integrations.transformers.calibration.future import FutureOfKeys
from flexdma.integrations.transformers.conversion import check_unconverted, convert_to_dma
from flexdma.integrations.transformers.converted import windows_per_head
from flexdma.integrations.transformers.eligibility import attention_calls, own_windows, refuse_wider_windows
from flexdma.integrations.transformers.falcon import rerouted
from flexdma.integrations.transformers.full_attention import full_attention
from flexdma.integrations.transformers.layer_selections import layer_selections

# The scale of the gates.  It keeps their order and changes logits by less than float32 rounds them.
SCALE = 2.0**-20
# Of the slope that changes outputs least, what a head gets.  Few of the queries that measure it ask for far facts.
SLOPE_SHARE = 0.5


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` measured, by attention layer in order of `layer_idx` and by KV head.

    r_squared: share of the deviance of a key's largest future probability that its value and key predict, in sequences that
        the fit did not use.
    peaks: mean over keys of their largest future probability.
    windows: keys kept by gate.  slopes: what a key loses per token of age, in logarithms of probability.
    errors: squared change of the head's outputs by the window and the best of the candidate slopes, as a share of the squares
        of the layer's outputs.
    tokens: number of calibration tokens.
    """

    r_squared: list[list[float]]
    peaks: list[list[float]]
    windows: list[list[int]]
    slopes: list[list[float]]
    errors: list[list[float]]
    tokens: int


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    window_size: int | Sequence[int | Sequence[int]],
    sinks: int = 4,
    recent: int | Sequence[int] = 64,
    far: int = 128,
    slopes: Sequence[float] = (0.0, 0.0005, 0.001, 0.002, 0.004, 0.016),
    reads_keys: bool = True,
    lowering: str | None = None,
) -> Calibration:
    """Convert a model, and compute gates that keep the keys which its full attention will look back at.

    Changes the model in place, as `convert_to_dma` does.  Its outputs stay as they were while the context is within the
    smallest window, because the gates are scaled by 2 ** -20: they rank keys and leave the logits alone.

    model: a decoder that `convert_to_dma` takes, in eval mode, with full attention or sliding windows of its own.
    batches: token ids [B, N] int64, or mappings with them in "input_ids"; without padding.  Texts like those that the model
        will read, at least three times as long as `far`; with passages that need earlier ones (`recall_sequences`) the gates
        learn what is asked for later.
    window_size: the mean number of keys per KV head that are kept by gate; heads get more or fewer, so that outputs change
        least.  A sequence, as in `convert_to_dma`, gives each layer or head its own.
    sinks, recent, lowering: as in `convert_to_dma`.  A query sees at most window + sinks + recent keys of a head.
    far: queries this many tokens after a key or more are its future.
    slopes: candidates of the preference for newer keys, in logarithms of probability that a key loses per token of age.  Each
        head gets half of the one that changes its outputs least.
    reads_keys: gates read the energies of keys beside values (`convert_to_dma`).

        one full pass   ->  p_j = max over queries i >= j + far and the heads of a group of P_ij
        x_j             =   v_j, and log(k_jd^2 + k_j(d + D/2)^2) for d < D/2, of all KV heads
        regression      ->  E[p_j] + 1e-4 = exp(x_j . Delta_h + constant)
        gates           ->  2 ** -20 (x_j . Delta_h + j slope_h)
        windows, slopes ->  sum over layers of |change of outputs|^2 / |outputs|^2 at 28 queries per sequence, made small

    One pass of the full model over all tokens, layer by layer, O(N) memory per layer, then about 10 Newton steps of
    O(tokens F ** 2) operations per head, F = Hkv (Dv + D / 2).  Keys and values of all tokens stay in CPU memory until then.
    Raises TypeError or ValueError naming the argument; for too few tokens, for models with learned sinks (`s_aux`).
    The model is converted only if all went well.
    """
    choice = {"window_size": window_size, "sinks": sinks, "recent": recent}
    checks.positive_int("far", far)
    slopes = _checked_slopes(slopes)
    check_unconverted(model)
    if model.training:
        raise ValueError("model: expected eval mode, got training mode, whose dropout would change what it attends to")
    with rerouted(model):
        calls = attention_calls(model)
    sliding = own_windows(calls)
    heads = [call.value.shape[1] for call in calls]
    selections = layer_selections(choice, heads)
    refuse_wider_windows(calls, selections, choice)
    layers = [call.layer for call in calls]
    futures = {layer: FutureOfKeys(far, reads_keys=reads_keys) for layer in layers}
    tokens = _observe(model, batches, futures, sliding, far)
    fits = [futures[layer].fit() for layer in logging.tqdm(layers, desc="Fitting gates", unit="layer")]
    mean = window_size if isinstance(window_size, int) and not isinstance(window_size, bool) else None
    each = list(zip(layers, fits, selections, strict=True))
    measured = [
        HeadErrors.of(futures[layer], weights, slopes, selection, mean)
        for layer, (weights, _), selection in logging.tqdm(each, desc="Measuring windows", unit="layer")
    ]
    # The model's own sliding window is for the recent tokens and the window.
    bounds = [sliding[layer] - selection.recent for layer, selection in zip(layers, selections, strict=True)]
    windows: Any = window_size if mean is None else windows_of_least_error(mean, measured, bounds)
    convert_to_dma(
        model, windows, form="identity", recency="slope", slopes=None, sinks=sinks, recent=recent, lowering=lowering,
        reads_keys=reads_keys,
    )  # fmt: skip
    best = [found.best(windows_per_head(layer)) for layer, found in zip(layers, measured, strict=True)]
    chosen = [[SLOPE_SHARE * slopes[number] for number in numbers] for numbers, _ in best]
    for layer, (weights, _), of_heads in zip(layers, fits, chosen, strict=True):
        _set_gate(layer.value_gate, weights, torch.tensor(of_heads))
    model.config.flexdma = model.config.flexdma | {"calibrated": True}
    return Calibration(
        r_squared=[r_squared.tolist() for _, r_squared in fits],
        peaks=[futures[layer].mean_peak.tolist() for layer in layers],
        windows=[windows_per_head(layer) for layer in layers],
        slopes=chosen,
        errors=[errors for _, errors in best],
        tokens=tokens,
    )


@torch.no_grad()
def _observe(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    futures: Mapping[nn.Module, FutureOfKeys],
    sliding: Mapping[nn.Module, int],
    far: int,
) -> int:
    """Run the full model over the batches; the number of their tokens."""
    tokens = 0
    with full_attention(model, lambda seen: futures[seen.layer].add(seen), sliding):
        for batch in logging.tqdm(batches, desc="Calibrating", unit="batch"):
            ids = _token_ids(batch, far)
            # Without the head, whose logits would be the largest tensor of the pass.
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
            tokens += ids.numel()
    return tokens


def _checked_slopes(slopes: Sequence[float]) -> list[float]:
    """The slopes as a list.  Raises ValueError naming the argument."""
    if (
        not isinstance(slopes, Sequence)
        or not slopes
        or not all(isinstance(slope, int | float) and 0 <= slope < float("inf") for slope in slopes)
    ):
        raise ValueError(f"slopes: expected a sequence of numbers >= 0, got {slopes!r}")
    return list(slopes)


@torch.no_grad()
def _set_gate(gate: ValueGate, weights: Tensor, slopes: Tensor) -> None:
    """Make the gate SCALE (input . weights + slopes position); an intercept would be the same for all keys."""
    gate.dt_proj.weight.copy_(weights.mT)
    gate.A.fill_(SCALE)
    gate.slope.copy_(slopes * SCALE)


def _token_ids(batch: Tensor | Mapping[str, Tensor], far: int) -> Tensor:
    """The token ids of a batch.  Raises TypeError or ValueError naming what is wrong with it."""
    if not isinstance(batch, Tensor | Mapping):
        raise TypeError(f"batches: expected token ids [B, N] or mappings with input_ids, got {type(batch).__name__}")
    ids, mask = (batch, None) if isinstance(batch, Tensor) else (batch.get("input_ids"), batch.get("attention_mask"))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batches: expected token ids [B, N] int64, got {got}")
    if mask is not None and not mask.all():
        raise ValueError("batches: expected sequences without padding, got an attention_mask with zeros")
    if ids.shape[1] < 3 * far:
        raise ValueError(f"batches: expected sequences of at least 3 far = {3 * far} tokens, got {ids.shape[1]}")
    return ids
