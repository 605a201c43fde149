"""States as safetensors files: exact, whole or absent, and refused when they are not what was written.

Tensors are named NAME.FIELD.  The file's metadata holds the options of each state and the SHA-256 of all, since
safetensors itself notices a file that is cut short, but not a bit that flipped.
"""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdma.state import OPTIONS, TENSORS, DynamicMaskState, refuse_difference, state_layout
from flexdma.whole_files import write_whole

FORMAT = "flexdma.DynamicMaskState/1"


def save_states(path: str | Path, states: Mapping[str, DynamicMaskState]) -> None:
    """Write states, such as those of all layers, under their names to one safetensors file; an old file is replaced.

    Needs safetensors (the extra flexdma[state]).
    """
    files = _safetensors()
    if not isinstance(states, Mapping) or not all(isinstance(state, DynamicMaskState) for state in states.values()):
        raise TypeError(f"states: expected a mapping of names to DynamicMaskState, got {type(states).__name__}")
    tensors = {
        f"{name}.{field}": tensor.detach().cpu().contiguous()
        for name, state in states.items()
        for field, tensor in state.tensors().items()
    }
    options = json.dumps({name: state.options() for name, state in states.items()})
    metadata = {"format": FORMAT, "states": options, "sha256": _digest(options, tensors)}
    write_whole(Path(path), lambda part: files.save_file(tensors, part, metadata=metadata))


def load_states(path: str | Path, device: torch.device | str = "cpu") -> dict[str, DynamicMaskState]:
    """The states of a file that `save_states` wrote, by name, on this device.

    Raises ValueError, naming the file, where it is cut short, changed, or something else; OSError where it is not there.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"path: expected a whole safetensors file, got {path} ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: expected the format {FORMAT}, got {metadata.get('format')!r} in {path}")
    digest = _digest(metadata.get("states", ""), tensors)
    if metadata.get("sha256") != digest:
        raise ValueError(f"path: expected states of SHA-256 {metadata.get('sha256')}, got {digest} in {path}")
    try:
        options: dict[str, dict[str, Any]] = json.loads(metadata["states"])
        states = {name: _assembled(name, tensors, chosen) for name, chosen in options.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path: expected states that their options describe, got {path} ({error})") from None
    return {name: state.to(device) for name, state in states.items()}


def _assembled(name: str, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> DynamicMaskState:
    window = options["window_size"]
    options = {option: options[option] for option in OPTIONS}
    options["window_size"] = tuple(window) if isinstance(window, list) else window
    found: dict[str, Any] = {field: tensors[f"{name}.{field}"] for field in TENSORS}
    state = DynamicMaskState(**found, **options)
    batch, heads, _slots, size = state.key.shape
    slots = DynamicMaskState.empty(batch, heads, size, device="meta", **options).position.shape[2]  # checks the options
    layout = state_layout((batch, heads, slots), size, state.value.shape[-1], state.key.dtype, state.gate.dtype)
    refuse_difference(name, state, layout, options, state.key.device)
    return state


def _digest(options: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the options and of every tensor's name, dtype, shape and bytes, by name."""
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
