"""The folder of a converted model and a text -> the model, and the tokens to show."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdma.tools.language_models import LanguageModel, load_language_model
from flexdma.tools.refusal import RefusedError
from flexdma.tools.view.labels import labels_of_tokens
from flexdma.tools.view.record import ShownText

CONVERTERS = "python -m flexdma retrofit or convert_to_dma(...).save_pretrained"

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # files, at least one of which a tokenizer has


def load_converted(folder: Path) -> LanguageModel:
    """The model and the tokenizer of a folder.  Raises RefusedError where it has no converted model or no tokenizer."""
    _check_converted(folder)
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        raise RefusedError(
            f"--model: expected a tokenizer beside the model, got none in {folder}; tokenizer.save_pretrained writes it"
        )
    try:
        return load_language_model(str(folder))
    except RefusedError as error:
        raise RefusedError(str(error).replace("MODEL:", "--model:", 1)) from error


def tokens_shown(tokenizer: Any, text: Path, start: int, length: int) -> tuple[Tensor, ShownText]:
    """Ids [1, N] of `length` tokens from `start`, after the first tokens of the tokenizer, and the text for the page.

    Raises RefusedError where the file is not UTF-8 or ends before `start`.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"--text: expected UTF-8, got other bytes in {text}") from error
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise RefusedError(f"--text: expected at least one token, got none in {text}")
    if start >= len(ids):
        raise RefusedError(f"--start: expected 0 to {len(ids) - 1:,}, got {start:,}")
    part = ids[start : start + length]
    shown = [*tokenizer("")["input_ids"], *part]
    labels = labels_of_tokens(tokenizer, shown)
    return torch.tensor([shown]), ShownText(text.name, "tokens", start, len(part), len(ids), labels)


def _check_converted(folder: Path) -> None:
    """Raise RefusedError unless config.json has what `convert_to_dma` writes."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"--model: expected the folder of a converted model ({CONVERTERS}), got {folder} without a config.json"
        ) from error
    if not isinstance(config, dict) or config.get("flexdma") is None:
        what = f"a plain {config['model_type']}" if isinstance(config, dict) and "model_type" in config else "none"
        raise RefusedError(f"--model: expected a converted model ({CONVERTERS}), got {what} in {folder}")
