"""The demo's checkpoint: writing is atomic, and loading reports any fault in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flexdma.tools.byte_models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.tools.view_cases import refused, view


def corrupt(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "dma.pt"
    content = json.loads(config.read_text())
    description = content["models"]["dma"]
    if how == "cut config":
        config.write_text(config.read_text()[:50])
    elif how == "binary config":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "foreign weights":
        weights.write_bytes(b"no weights at all")
    elif how == "code in weights":
        torch.save({"embedding.weight": Path("x")}, weights)
    elif how == "a list of weights":
        torch.save([1, 2], weights)
    else:
        changes: dict[str, dict[str, Any]] = {
            "other sizes": {"sizes": {**description["sizes"], "width": 64}},
            "odd sizes": {"sizes": {**description["sizes"], "heads": 3}},
            "no heads": {"sizes": {**description["sizes"], "heads": 0}},
            "words for sizes": {"sizes": dict.fromkeys(description["sizes"], "x")},
            "missing sizes": {"sizes": {}},
            "unknown recency": {"recency": "never"},
            "no label": {"label": None},
        }
        description.update(changes[how])
        config.write_text(json.dumps(content))


CORRUPTIONS = (
    "cut config, binary config, no weights, cut weights, empty weights, foreign weights, code in weights, "
    "a list of weights, other sizes, odd sizes, no heads, words for sizes, missing sizes, unknown recency, no label"
)


@pytest.mark.parametrize("how", CORRUPTIONS.split(", "))
def test_a_corrupt_checkpoint_is_one_line(how, text_file, checkpoint, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    corrupt(folder, how)
    refused(capsys, view(text_file, folder, tmp_path / "page.html"), "--checkpoint")
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    models = {kind: trained.model for kind, trained in load_checkpoint(checkpoint).items()}
    save_checkpoint(folder, models, dict.fromkeys(models, "first"))
    save_checkpoint(folder, models, dict.fromkeys(models, "second"))
    assert {trained.label for trained in load_checkpoint(folder).values()} == {"second"}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, models, dict.fromkeys(models, "third"))
    assert {trained.label for trained in load_checkpoint(folder).values()} == {"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
