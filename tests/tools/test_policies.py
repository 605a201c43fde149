"""The table of systems: complete, its functions exist or are open, its counts are those of dense masks."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from flexdma.__main__ import CANNOT, main
from flexdma.tools.gate_families import gate_families
from flexdma.tools.policies.examples import Scores
from flexdma.tools.policies.measure import visible, visited
from flexdma.tools.policies.systems import PAGES, PARTS, POLICIES, RECIPES, SYSTEMS, found
from flexdma.tools.policies.tables import fixed_cells, made_by, status

PAGE = Path(__file__).parents[2] / "docs/policies.md"
# The systems that the library is meant to compute.
MEANT = (
    "DMA, causal top-w", "DMA, global top-w", "DMA, threshold", "Sliding window", "StreamingLLM", "MoA", "Documents",
    "FlashMask", "DMS", "DMS, training", "KVzap", "FoX, adaptive pruning", "SnapKV", "H2O", "TRIM-KV", "HAX, key selection",
    "HAX, hash buckets", "FSA", "SeerAttention", "MoBA", "NSA, selection", "BiFormer", "Double Sparsity", "LServe", "Quest",
    "Gated Attention", "SQA", "MLA",
)  # fmt: skip
ROWS = {system.name: system for system in SYSTEMS}
MASKS = [system for system in SYSTEMS if system.example is not None and not system.missing]


def test_every_system_has_one_row():
    assert sorted(ROWS) == sorted(MEANT)
    assert len(SYSTEMS) == len(ROWS) == len({system.slug for system in SYSTEMS})


@pytest.mark.parametrize("module", [POLICIES, RECIPES, PAGES, "flexdma.score_mods"])
def test_every_public_function_has_a_row(module):
    if found(f"{module}:__all__") is None:
        pytest.skip(f"this version has no {module}")
    listed = {name for system in SYSTEMS for name in system.functions} | PARTS.keys()
    assert {f"{module}:{name}" for name in importlib.import_module(module).__all__} <= listed


def test_parts_exist_or_their_module_does_not():
    for name in PARTS:
        assert found(name) or found(f"{name.partition(':')[0]}:__all__") is None or "routed" in name, name


@pytest.mark.parametrize("system", SYSTEMS, ids=ROWS)
def test_a_row_is_complete_or_says_why_not(system):
    assert system.functions
    assert all(found(name) for name in system.functions) == (system.status == "complete")
    assert all(name in system.status for name in system.missing)
    assert system.example is not None or system.why


@pytest.mark.parametrize("system", SYSTEMS, ids=ROWS)
def test_the_page_has_the_row(system):
    lines = [
        line for line in PAGE.read_text().splitlines() if f"| {system.name} |" in line or f"[{system.name}]" in line
    ]
    assert len(lines) == 1, "python -m flexdma policies --markdown docs/policies.md"
    for text in (*fixed_cells(system)[1:], *made_by(system), status(system), system.paper):
        assert text in lines[0]
    if system in MASKS:
        assert (PAGE.parent / "masks" / f"{system.slug}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("system", MASKS, ids=lambda system: system.name)
def test_counts_are_those_of_the_dense_mask(system):
    length, block = 192, 16
    mask = system.example(Scores(gate_families(length)["iid"][None, None], 32, block))
    seen = visible(mask, length)
    assert seen.any(0).sum() > 1
    tiles = seen.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(-1).any(1).sum() * block**2 / seen.sum()
    own_order, packed = visited(mask, length, block)
    if isinstance(mask, tuple):  # Lifespans too
        assert own_order == pytest.approx(tiles.item())
    else:
        assert own_order >= tiles.item() - 1e-6
    assert packed is None or 1 <= packed <= own_order + 1e-6


def test_one_system_as_json(capsys):
    assert main(["policies", "--system", "sliding window", "--length", "256", "--window", "32", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["functions"] == ["flexdma:sliding_window", "flexdma.block_masks:sliding_window_mask_mod"]
    assert record["status"] == "complete"
    # Blocks of 64 in a window of 32: row blocks visit 1, 2, 2 and 2 blocks.
    pairs = sum(min(query + 1, 32) for query in range(256))
    assert record["visited_over_ideal"] == pytest.approx(7 * 64**2 / pairs)


def test_a_folder_gets_the_table_and_pictures(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib.image")
    assert main(["policies", "--system", "Sliding", "--length", "256", "--window", "32", "--out", str(tmp_path)]) == 0
    assert "sliding_window" in capsys.readouterr().out
    assert '<img src="masks/sliding-window.png"' in (tmp_path / "policies.md").read_text()
    assert json.loads((tmp_path / "policies.json").read_text())[0]["system"] == "Sliding window"
    drawn = torch.tensor(matplotlib.imread(tmp_path / "masks/sliding-window.png"))[..., 3] > 0.5
    query, key = torch.arange(192)[:, None], torch.arange(192)
    assert torch.equal(drawn, (key <= query) & (query - key < 32))


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    (tmp_path / "page.md").write_text("nothing")
    assert main(["policies", "--system", "Quest", "--markdown", str(tmp_path / "page.md")]) == CANNOT
    assert "<!-- policies -->" in capsys.readouterr().err
