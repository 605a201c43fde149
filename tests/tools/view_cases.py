"""For tests of the view: small models with gates that select, a text with much markup, the data of a page, the dense mask."""

import base64
import json
import re
import struct
from pathlib import Path

import torch

from flexdma.__main__ import main
from flexdma.reference import dense_visibility
from flexdma.tools.byte_models.attentions import KINDS
from flexdma.tools.byte_models.checkpoint import load_checkpoint, save_checkpoint
from flexdma.tools.byte_models.model import ByteModel, ModelSizes, recorded_gates

SIZES = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, window=6)
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script> &amp; \"'` @data@ {{x}} ${y}\n"
    "</SCRIPT\t><svg/onload=alert(3)>]]> --> \\u003cb\\u003e é 漢 \u202e\u2028\x00 e\u0301"
)


def make_checkpoint(folder: Path) -> Path:
    """Untrained models of all kinds, labelled "label of KIND"."""
    torch.manual_seed(0)
    models = {kind: ByteModel(kind, SIZES, recency="slope", seed=0) for kind in KINDS}
    with torch.no_grad():
        for kind in ("dma", "dma-recency"):
            for attention in models[kind].attentions():
                attention.gate.A.normal_()
    save_checkpoint(folder, models, {kind: f"label of {kind}" for kind in KINDS})
    return folder


def make_text(path: Path) -> Path:
    path.write_bytes(HOSTILE.encode() + b"\xff\xc3" + b" and then the rest of it." * 3)
    return path


def view(text: Path, folder: Path, out: Path, *options: str, source: str = "--checkpoint") -> int:
    return main(["view", "--text", str(text), source, str(folder), "--out", str(out), *options])


def refused(capsys, code: int, says: str) -> None:
    """Check that the last command printed one line on standard error and returned 2."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert says in error


def data_of(page: Path) -> dict:
    content = page.read_text(encoding="utf-8")
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    return json.loads(block)


def numbers(kind: str, packed: str) -> torch.Tensor:
    """The array in base64 of the struct module's kind "H" or "f"."""
    content = base64.b64decode(packed)
    return torch.tensor(struct.unpack(f"<{len(content) // struct.calcsize(kind)}{kind}", content))


def visible(data: dict, head: dict) -> torch.Tensor:
    """[Q, K] of a head of the page."""
    query, birth = torch.arange(len(data["tokens"]))[:, None], torch.tensor(data["birth"])
    return (birth <= query) & (query < numbers("H", head["death"]))


def dense_rows(checkpoint: Path, kind: str, content: bytes) -> list[torch.Tensor]:
    """The dense mask [Hkv, Q, K] of each layer."""
    model = load_checkpoint(checkpoint)[kind].model
    with torch.no_grad(), recorded_gates(model) as gates:
        model(torch.tensor([list(content)]))
    if kind == "full":
        return [torch.ones(len(content), len(content), dtype=torch.bool).tril().expand(2, -1, -1) for _ in gates]
    return [dense_visibility(gate, window_size=SIZES.window)[0] for gate in gates]
