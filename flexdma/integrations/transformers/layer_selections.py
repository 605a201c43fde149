"""The selection of each attention layer, from the arguments of `convert_to_dma` or from a saved config."""

from collections.abc import Sequence
from typing import Any

from flexdma.lifespans import STATEFUL_SELECTIONS, Selection

# The arguments that take one item per layer.
PER_LAYER = ("window_size", "recent")


def as_json(sizes: Any) -> Any:
    """The same numbers with lists for tuples, as they are after a round trip through JSON."""
    return [as_json(size) for size in sizes] if isinstance(sizes, list | tuple) else sizes


def layer_selections(choice: dict[str, Any], heads: Sequence[int]) -> list[Selection]:
    """One selection per attention layer, in order of `layer_idx`.

    choice: `window_size`, an int or None, or one item per layer, each an int or one int per KV head or None; `recent`, an int
        or one per layer; `sinks`, an int; `selection`, "causal" if it is missing.
    heads: number of KV heads of each layer.
    Raises TypeError or ValueError naming the argument, and the layer where an item is wrong.
    """
    windows = _per_layer("window_size", choice["window_size"], len(heads))
    recent = _per_layer("recent", choice["recent"], len(heads))
    selections = []
    for number, count in enumerate(heads):
        try:
            selections.append(
                Selection.of(choice.get("selection", "causal"), windows[number], choice["sinks"], recent[number], heads=count,
                             kinds=STATEFUL_SELECTIONS)
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise _at_layer(error, number, choice) from None
    return selections


def argument_at(name: str, choice: dict[str, Any], number: int) -> str:
    """The name of the argument of one layer: `window_size`, or `window_size[3]` where it was given per layer."""
    return f"{name}[{number}]" if isinstance(choice[name], list | tuple) else name


def _per_layer(name: str, sizes: Any, layers: int) -> list[Any]:
    if not isinstance(sizes, list | tuple):
        return [sizes] * layers
    if len(sizes) != layers:
        raise ValueError(f"{name}: expected an int or one item per attention layer = {layers}, got {len(sizes)} items")
    return list(sizes)


def _at_layer(error: TypeError | ValueError, number: int, choice: dict[str, Any]) -> TypeError | ValueError:
    """The same error with the argument's name as the caller wrote it."""
    name, _, rest = str(error).partition(":")
    return type(error)(f"{argument_at(name, choice, number)}:{rest}") if name in PER_LAYER else error
