"""Models and batches that cannot be distilled.  Each error names what is wrong."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexdma.integrations.transformers.converted import converted_layers
from flexdma.integrations.transformers.future_peaks import FIRST, LEAST_QUERIES

# Forms of gates that can predict a logarithm: linear in it, at any scale.
FORMS = ("linear", "identity")


def check_model(model: Any, gates: bool) -> None:
    """Raise TypeError or ValueError unless it is a converted causal language model without dropout and noise.

    gates: whether its gates are to be trained.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a converted model of transformers, got {type(model).__name__}")
    layers = converted_layers(model)
    if model.get_output_embeddings() is None or model.base_model is model:
        raise TypeError(f"model: expected a causal language model, got {type(model).__name__}, which has no logits")
    for name, module in model.named_modules():
        _check_noise(name, module)
    for layer in layers:
        if (kind := layer.dynamic_mask_options["selection"]) != "causal":
            raise ValueError(f"model: expected layers with selection='causal', got {kind!r}")
    for layer in layers if gates else ():
        _check_gate(layer.value_gate)


def token_ids(batch: Tensor | Mapping[str, Any]) -> Tensor:
    """The token ids [B, N] of a batch.  Raises TypeError or ValueError for anything besides them, padding included."""
    if not isinstance(batch, Tensor | Mapping):
        raise TypeError(f"batches: expected token ids [B, N] or mappings with input_ids, got {type(batch).__name__}")
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if "labels" in given:
        raise ValueError(
            "batches: expected no labels, because the full model's predictions are the targets, got labels"
        )
    if given:
        raise ValueError(f"batches: expected input_ids and attention_mask alone, got {', '.join(sorted(given))}")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        got = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batches: expected input_ids [B, N] int64, got {got}")
    if mask is not None and not bool(mask.all()):
        raise ValueError("batches: expected sequences without padding, got an attention_mask with zeros")
    return ids


def check_tokens(ids: Tensor, smallest: int, far: int | None) -> None:
    """Raise ValueError for sequences from which nothing can be learned.

    smallest: number of keys that every head keeps.  far: of the gates; None = they are not trained.
    """
    length = ids.shape[1]
    if far is not None:
        shortest = max(3 * far, FIRST + far + LEAST_QUERIES + 1)
        if length < shortest:
            raise ValueError(f"batches: expected sequences of at least {shortest} tokens with far={far}, got {length}")
    if length <= smallest:
        raise ValueError(
            f"batches: expected sequences longer than the {smallest} keys that every head keeps, got {length} tokens"
        )


def _check_gate(gate: Any) -> None:
    if gate.form not in FORMS:
        raise ValueError(f"model: expected gates of form {' or '.join(map(repr, FORMS))}, got {gate.form!r}")
    if gate.recency == "forget":
        raise ValueError("model: expected gates with recency None or 'slope', got 'forget'")
    if bool((gate.A < 0).any()):
        raise ValueError(f"model: expected gates with A >= 0, got A = {gate.A.min().item():g}")


def _check_noise(name: str, module: nn.Module) -> None:
    """Raise ValueError for dropout and noise of training mode, by the names of attributes that transformers gives them."""
    for attribute, value in vars(module).items():
        is_noise = "drop" in attribute or "jitter" in attribute or (isinstance(module, nn.Dropout) and attribute == "p")
        if is_noise and isinstance(value, float) and value > 0:
            where = f"{name}.{attribute}" if name else attribute
            raise ValueError(
                f"model: expected no dropout or noise, because the student must match the teacher, got {where} = {value}"
            )
