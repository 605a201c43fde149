"""The trained models as files: config.json with their settings, and the weights of each as KIND.pt.

Loading runs no code from the files (`weights_only`).  For a folder that is no checkpoint it raises an error of one line.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexdma._version import __version__
from flexdma.tools.byte_models.attentions import KINDS, RECENCIES
from flexdma.tools.byte_models.model import ByteModel, ModelSizes

FORMAT = 1
# Errors of torch.load, the model and load_state_dict for files that are truncated, of another kind or of other sizes.
FOREIGN = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
)


class CheckpointError(ValueError):
    """The folder is no usable checkpoint; the message is one line with the reason."""


class Trained(NamedTuple):
    """A model and its name in tables and pictures."""

    label: str
    model: ByteModel


def save_checkpoint(folder: Path, models: Mapping[str, ByteModel], labels: Mapping[str, str]) -> None:
    """Write the models beside `folder`, then rename.  An interruption leaves a whole checkpoint or none."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        described = {}
        for kind, model in models.items():
            torch.save({name: t.detach().cpu() for name, t in model.state_dict().items()}, part / f"{kind}.pt")
            described[kind] = {"label": labels[kind], "recency": model.recency, "sizes": asdict(model.sizes)}
        config = {"format": FORMAT, "flexdma": __version__, "models": described}
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Trained]:
    """The models by kind, on the CPU, in evaluation mode.  Raises CheckpointError."""
    described = _read_config(folder / "config.json")
    return {kind: _load_model(folder, kind, description) for kind, description in described.items()}


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"expected a checkpoint folder of the demo, got no {path} ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {path}, got something else ({_first_line(error)})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"expected format {FORMAT} in {path}, got another")
    models = config.get("models")
    if not isinstance(models, dict) or not models or not all(isinstance(entry, dict) for entry in models.values()):
        raise CheckpointError(f"expected models in {path}, got none")
    return models


def _load_model(folder: Path, kind: str, description: dict[str, Any]) -> Trained:
    where = folder / "config.json"
    label, recency, sizes = (description.get(key) for key in ("label", "recency", "sizes"))
    known = {field.name for field in fields(ModelSizes)}
    if kind not in KINDS or recency not in RECENCIES or not isinstance(label, str):
        raise CheckpointError(f"expected one of {', '.join(KINDS)} with label and recency in {where}, got {kind!r}")
    if not isinstance(sizes, dict) or set(sizes) != known:
        raise CheckpointError(f"expected the sizes {', '.join(sorted(known))} of {kind} in {where}")
    path = folder / f"{kind}.pt"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model = ByteModel(kind, ModelSizes(**{**sizes, "slopes": tuple(sizes["slopes"])}), recency=recency, seed=0)
        model.load_state_dict(weights)
    except OSError as error:
        raise CheckpointError(f"expected weights in {path} ({error.strerror or _first_line(error)})") from None
    except FOREIGN as error:
        raise CheckpointError(f"expected the weights that {where} describes in {path} ({_first_line(error)})") from None
    return Trained(label, model.eval())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
