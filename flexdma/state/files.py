"""States as safetensors files.  Writing is atomic, and loading refuses files that have changed.

Tensors are named NAME.FIELD.  The metadata holds the options of each state and a SHA-256 of everything, because safetensors
detects a truncated file but not a flipped bit.
"""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdma.atomic_write import atomic_write
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.growing import GrowingState
from flexdma.state.value import State

FORMAT = "flexdma.DynamicMaskState/3"
# Before, sinks and recent keys took places of the top-w.  Of states without them the formats are the same.
FORMER = "flexdma.DynamicMaskState/2"
# Beside the options of a GrowingState; a DynamicMaskState has no such entry.
GROWS = "grows"


def save_states(path: str | Path, states: Mapping[str, State]) -> None:
    """Write states, such as those of all layers, by name to one safetensors file.  It replaces an old file.

    Needs safetensors (the extra flexdma[state]).  Raises TypeError or ValueError naming the argument.
    """
    files = _safetensors()
    if not isinstance(states, Mapping):
        raise TypeError(f"states: expected a mapping of names to states, got {type(states).__name__}")
    for name, state in states.items():
        if not isinstance(name, str) or not isinstance(state, DynamicMaskState | GrowingState):
            raise TypeError(f"states: expected names to states, got {name!r} to {type(state).__name__}")
    path = Path(path)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {path}")
    tensors = {
        f"{name}.{field}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # states may share some
        for name, state in states.items()
        for field, tensor in state.tensors().items()
    }
    options = json.dumps({name: _described(state) for name, state in states.items()})
    metadata = {"format": FORMAT, "states": options, "sha256": _digest(options, tensors)}
    atomic_write(path, lambda part: files.save_file(tensors, part, metadata=metadata))


def load_states(path: str | Path, device: torch.device | str = "cpu") -> dict[str, State]:
    """The states of a file written by `save_states`, by name, on this device.

    Raises ValueError naming the file where it is truncated, changed or not such a file, and where its states have sinks or
    recent keys by the rule of the former format; OSError where it does not exist.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"path: expected a whole safetensors file, got {path} ({error})") from None
    if metadata.get("format") not in (FORMAT, FORMER):
        raise ValueError(f"path: expected the format {FORMAT}, got {metadata.get('format')!r} in {path}")
    digest = _digest(metadata.get("states", ""), tensors)
    if metadata.get("sha256") != digest:
        raise ValueError(f"path: expected states of SHA-256 {metadata.get('sha256')}, got {digest} in {path}")
    try:
        options: dict[str, dict[str, Any]] = json.loads(metadata["states"])
        states = {name: _assembled(name, tensors, chosen) for name, chosen in options.items()}
        described = {f"{name}.{field}" for name, state in states.items() for field in state.tensors()}
        if described != set(tensors):
            raise ValueError(f"undescribed tensors {sorted(set(tensors) - described)}")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"path: expected states that their options describe, got {path} ({error})") from None
    if metadata["format"] == FORMER:
        _refuse_lost_keys(path, states)
    return {name: state.to(device) for name, state in states.items()}


def _refuse_lost_keys(path: str | Path, states: Mapping[str, State]) -> None:
    """Raise ValueError where a state of the former format lacks keys that a query sees today."""
    for name, state in states.items():
        if not isinstance(state, DynamicMaskState) or (state.selection == "sliding" and not state.recent):
            continue
        if state.sinks or state.recent:
            raise ValueError(
                f"path: expected states without sinks and recent keys in the format {FORMER}, in which those took places of "
                f"the top-w, so that keys are lost, got {name!r} with sinks={state.sinks}, recent={state.recent} in {path}; "
                "make the state again from its tokens"
            )


def _described(state: State) -> dict[str, Any]:
    return state.options() | ({GROWS: True} if isinstance(state, GrowingState) else {})


def _assembled(name: str, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> State:
    options = dict(options)
    kind: type[State] = GrowingState if options.pop(GROWS, False) else DynamicMaskState
    if isinstance(options.get("window_size"), list):
        options["window_size"] = tuple(options["window_size"])
    optional = {"bias": tensors.get(f"{name}.bias")}
    found: dict[str, Any] = {of: tensors[f"{name}.{of}"] for of in kind.TENSORS if of not in optional} | optional
    state = kind(**found, **options)
    batch, heads, _slots, size = state.key.shape
    like = kind.empty(  # type: ignore[attr-defined]
        batch,
        heads,
        size,
        value_dim=state.value.shape[-1],
        dtype=state.key.dtype,
        gate_dtype=state.gate.dtype,
        bias_dtype=None if state.bias is None else state.bias.dtype,
        **options,
    )
    like.restore(state)  # shapes and dtypes
    if (state.length < 0).any() or not ((state.position >= -1) & (state.position < state.length[:, None, None])).all():
        raise ValueError(f"{name}: expected positions from -1 to below the length of the sequence")
    return state


def _digest(options: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the options and of every tensor's name, dtype, shape and bytes, sorted by name."""
    digest = hashlib.sha256(options.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("states as files need safetensors: pip install 'flexdma[state]'") from error
    return safetensors.torch
