"""Argument checks.  Every message names the argument, what was expected and what came.

They read shapes, dtypes and devices, never values, so they do not synchronise and can be traced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Those that choose keys by their gates, and all: the others choose by position alone, and need no gate.
SELECTIONS_BY_GATE = ("causal", "global", "threshold")
SELECTIONS = (*SELECTIONS_BY_GATE, "sliding", "full")
LOWERINGS = ("flex", "gather", "dense")
REDUCTIONS = ("sum", "max")
LARGEST = 2**31 - 1


def positive_int(name: str, value: object, minimum: int = 1) -> None:
    """Raise unless `value` is an int (or a symbolic one) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST}, as positions are int32, got {value}")


def one_of(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def tensor(name: str, value: object, shape: Sequence[object], like: Tensor | None = None) -> Tensor:
    """Raise unless `value` is a tensor of this shape (a name stands for any size) on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{_text(shape)}], got {type(value).__name__}")
    matches = value.dim() == len(shape)
    for want, have in zip(shape, value.shape, strict=False):
        matches = matches and (isinstance(want, str) or want == have)
    if not matches:
        raise ValueError(f"{name}: expected [{_text(shape)}], got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")
    return value


def floating(name: str, value: Tensor) -> None:
    """Raise unless the tensor is real floating point, of at least 16 bits."""
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {value.dtype}")
    if value.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected a floating point dtype of at least 16 bits, got {value.dtype}")


def group_size(name: str, heads: int, num_query_heads: int | None) -> int:
    """Query heads per head of `name`; 1 where num_query_heads is None.  Raises ValueError where they do not divide."""
    if num_query_heads is None:
        return 1
    positive_int("num_query_heads", num_query_heads)
    if num_query_heads % heads:
        raise ValueError(f"num_query_heads: expected a multiple of {name}'s {heads} heads, got {num_query_heads}")
    return num_query_heads // heads


def block_sizes(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a block given as one int or as a pair."""
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(pair) != 2:
        raise ValueError(f"block_size: expected one int or (rows, keys), got {block_size!r}")
    rows, columns = pair
    positive_int("block_size", rows)
    positive_int("block_size", columns)
    return rows, columns


def _text(shape: Sequence[object]) -> str:
    return ", ".join(map(str, shape))


def selected_keys(
    gate: Tensor, key_padding_mask: Tensor | None, document_ids: Tensor | None, name: str = "gate"
) -> None:
    """Check numbers of keys [B, Hkv, K] called `name`, padding mask [B, K] and document ids [B, K] against each other."""
    batch, _heads, length = tensor(name, gate, ("B", "Hkv", "K")).shape
    floating(name, gate)
    masks(batch, length, gate, key_padding_mask, document_ids)


def masks(batch: int, length: int, like: Tensor, key_padding_mask: Tensor | None, document_ids: Tensor | None) -> None:
    """Check padding mask [B, K] and document ids [B, K], on the device of `like`."""
    if key_padding_mask is not None:
        padding_mask(key_padding_mask, batch, length, like)
    if document_ids is not None:
        tensor("document_ids", document_ids, (batch, length), like)
        if document_ids.is_floating_point() or document_ids.is_complex() or document_ids.dtype == torch.bool:
            raise TypeError(f"document_ids: expected an integer dtype, got {document_ids.dtype}")


def padding_mask(mask: Tensor, batch: int, length: int, like: Tensor) -> None:
    """Raise unless it is [B, K] bool on the device of `like`."""
    tensor("key_padding_mask", mask, (batch, length), like)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected torch.bool (True = real), got {mask.dtype}")


def windows(window_size: int | Sequence[int] | None, heads: int, needed: bool) -> list[int]:
    """The window sizes as a list of 1 or `heads` ints.  Empty for None, which raises where a window is needed."""
    if window_size is None:
        if needed:
            raise TypeError("window_size: expected an int or one int per key/value head, got None")
        return []
    return per_head("window_size", window_size, heads)


def per_head(name: str, numbers: int | Sequence[int], heads: int, minimum: int = 1) -> list[int]:
    """One int, or one for each of `heads`, as a list of 1 or `heads` ints of at least `minimum`."""
    if isinstance(numbers, int | torch.SymInt):
        positive_int(name, numbers, minimum)
        return [numbers]
    if not isinstance(numbers, list | tuple):
        raise TypeError(f"{name}: expected an int or one int per key/value head, got {type(numbers).__name__}")
    if len(numbers) != heads:
        raise ValueError(f"{name}: expected one int per key/value head = {heads}, got {len(numbers)}")
    for number in numbers:
        positive_int(name, number, minimum)
    return list(numbers)


def attention_arguments(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check query, key and value against each other."""
    batch, query_heads, queries, size = tensor("query", query, ("B", "Hq", "Q", "D")).shape
    tensor("key", key, (batch, "Hkv", "K", size), query)
    heads, keys = key.shape[1:3]
    tensor("value", value, (batch, heads, keys, "Dv"), query)
    for name, argument in (("query", query), ("key", key), ("value", value)):
        floating(name, argument)
        if argument.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} as query has, got {argument.dtype}")
    for name, count, what in (
        ("query", query_heads, "head"),
        ("query", queries, "position"),
        ("key", heads, "head"),
        ("query", size, "element a head"),
    ):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1 {what}, got {count}")
    if query_heads % heads:
        raise ValueError(f"query: expected a multiple of key's {heads} heads, got {query_heads} heads")
    if queries > keys:
        raise ValueError(f"query: expected at most K = {keys} queries (they are the last ones), got {queries}")


def gate(gate: Tensor | None, key: Tensor, selection: str) -> None:
    """Check gates as `bias`.  None only where the selection needs none."""
    if gate is None and selection in SELECTIONS_BY_GATE:
        raise TypeError(f"gate: expected a tensor with selection={selection!r}, which chooses by it, got None")
    if gate is not None:
        bias("gate", gate, key)


def bias(name: str, bias: object, key: Tensor) -> None:
    """Check one floating point number for each key, as `per_key`."""
    if isinstance(bias, Tensor):
        floating(name, bias)
    per_key(name, bias, key)


def recency_ranks(recency_ranks: object, recency: str | None) -> None:
    """Check whether a recency ranks keys; only one that there is may be added to logits alone."""
    if not isinstance(recency_ranks, bool):
        raise TypeError(f"recency_ranks: expected a bool, got {recency_ranks!r}")
    if recency is None and not recency_ranks:
        raise ValueError("recency_ranks: expected True with recency=None, which adds nothing to logits, got False")


def per_key(name: str, numbers: object, key: Tensor) -> None:
    """Check one number for each key of [B, Hkv, K, D]: [B, Hkv, K], or [B, 1, K] for all heads."""
    batch, heads, keys = key.shape[:3]
    shared = isinstance(numbers, Tensor) and numbers.dim() == 3 and numbers.shape[1] == 1
    tensor(name, numbers, (batch, 1 if shared else heads, keys), key)


def lifespans(lifespans: object, key: Tensor, name: str = "lifespans") -> None:
    """Check a birth and a death for each key, as `per_key`."""
    if not isinstance(lifespans, tuple | list) or len(lifespans) != 2:
        raise TypeError(f"{name}: expected Lifespans(birth, death), got {type(lifespans).__name__}")
    for each, bound in zip((f"{name}.birth", f"{name}.death"), lifespans, strict=True):
        per_key(each, bound, key)
        if bound.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{each}: expected torch.int32 or torch.int64, got {bound.dtype}")
    if lifespans[0].shape != lifespans[1].shape:
        raise ValueError(f"{name}.death: expected {list(lifespans[0].shape)} as birth, got {list(lifespans[1].shape)}")


def intervals(
    lifespans_of_keys: Any, biases: Any, key: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor | None]]:
    """Check one Lifespans with its bias, or a sequence of them with one bias for all or a bias each, as `per_key`.

    Returns a list of lifespans and one of biases, of equal lengths.
    """
    several = isinstance(lifespans_of_keys, tuple | list) and not any(isinstance(t, Tensor) for t in lifespans_of_keys)
    each_bias = several and isinstance(biases, tuple | list)
    given = list(lifespans_of_keys) if several else [lifespans_of_keys]
    if not given:
        raise ValueError("lifespans: expected at least one Lifespans(birth, death), got none")
    biases = list(biases) if each_bias else [biases] * len(given)
    if len(biases) != len(given):
        raise ValueError(f"bias: expected one for each of {len(given)} intervals, got {len(biases)}")
    for number, pair in enumerate(zip(given, biases, strict=True)):
        lifespans(pair[0], key, f"lifespans[{number}]" if several else "lifespans")
        if pair[1] is not None:
            bias(f"bias[{number}]" if each_bias else "bias", pair[1], key)
    return given, biases


def scores(scale: float | None, score_mod: object) -> None:
    """Check scale and score_mod."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod: expected a function, got {type(score_mod).__name__}")


def sink_logits(sink_logits: Tensor | None, query: Tensor) -> None:
    """Check learned sinks [Hq]."""
    if sink_logits is not None:
        floating("sink_logits", tensor("sink_logits", sink_logits, (query.shape[1],), query))


def sinks_without_recent(sink_logits: Tensor | None, selection: str, recent: int) -> None:
    """Refuse learned sinks where the best visible gate may be a recent key's: it could leave before its document ends."""
    if sink_logits is not None and recent and selection in ("global", "threshold"):
        raise ValueError(
            f"recent: expected 0 with sink_logits and selection={selection!r}, as the best gate may be a recent one, "
            f"got {recent}"
        )


def ages(ages: Sequence[tuple[int, int | None]] | None) -> None:
    """Check bands of age (low, high), 0 <= low < high; high = None has no end."""
    if ages is None:
        return
    if not isinstance(ages, list | tuple):
        raise TypeError(f"ages: expected a list of (low, high), got {type(ages).__name__}")
    if not ages:
        raise ValueError("ages: expected at least one (low, high), got none; None counts all ages")
    for band in ages:
        if not isinstance(band, list | tuple) or len(band) != 2:
            raise TypeError(f"ages: expected a list of (low, high), got {ages!r}")
        low, high = band
        positive_int("ages: low", low, 0)
        if high is not None:
            positive_int("ages: high", high, low + 1)
