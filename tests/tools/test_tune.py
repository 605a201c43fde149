"""tune: the search with a given timer, the file, who wins over whom, and one real run on this CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from flexdma import dynamic_mask_attention, inspect_kernels
from flexdma.__main__ import CANNOT, main
from flexdma.lowerings import default_options, tuned
from flexdma.lowerings.tuned import Key, Winner, as_json, from_json, key_of
from flexdma.tools.tile_grid import Sizes, sizes_of
from flexdma.tools.tune import store
from flexdma.tools.tune.candidates import Candidate, candidates
from flexdma.tools.tune.measure import Timing, search

CPU = torch.device("cpu")
KEY = Key("NVIDIA H100", "bfloat16", 128, 4, "training", "2.13.0", "3.9.0")
WINNER = Winner(KEY, (128, 128), {"fwd_num_warps": 8, "bwd_BLOCK_M1": 32}, 0.5, 1.0)


@pytest.fixture
def winners(tmp_path, monkeypatch):
    """The file of winners, in a folder that does not exist yet."""
    path = tmp_path / "caches" / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    yield path
    tuned.winners_of.cache_clear()


def here(phase="inference", **others):
    return replace(key_of(CPU, torch.float32, 16, 2, trains=phase == "training"), **others)


def test_the_fastest_is_kept_as_soon_as_it_is_found():
    shares = {"a": 0.97, "b": 1.2, "c": 0.8, "d": None, "e": 0.81}
    kept: list[Winner] = []

    def timer(candidate):
        share = shares[candidate.name]
        return Timing(failed="out of memory") if share is None else Timing(2 * share, 2.0)

    tried = [Candidate(name, (128, 128), {"num_warps": n}) for n, name in enumerate(shares, 1)]
    best = search(KEY, tried, timer, kept.append)
    assert kept == [
        Winner(KEY, (128, 128), {"num_warps": 1}, 1.94, 2.0),
        Winner(KEY, (128, 128), {"num_warps": 3}, 1.6, 2.0),
    ]
    assert best == kept[-1]


def test_a_difference_within_the_noise_wins_nothing():
    kept: list[Winner] = []
    assert search(KEY, [Candidate("a", (128, 128))], lambda candidate: Timing(0.99, 1.0), kept.append) is None
    assert kept == []


def test_what_is_kept_is_read_in_another_process(winners):
    store.keep(winners, WINNER)
    store.keep(winners, replace(WINNER, key=replace(KEY, torch="2.12.0")))
    store.keep(winners, replace(WINNER, seconds=0.25))
    assert from_json(winners.read_text()) == store.winners_in(winners)
    assert [(each.key.torch, each.seconds) for each in store.winners_in(winners)] == [("2.12.0", 0.5), ("2.13.0", 0.25)]
    code = f"from flexdma.lowerings import tuned; print(tuned.winner(tuned.{KEY!r}).seconds)"
    found = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)
    assert found.stdout == "0.25\n", found.stderr
    store.drop(winners, KEY)
    assert [each.key.torch for each in store.winners_in(winners)] == ["2.12.0"]


def test_the_file_is_in_the_folder_of_caches(monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(tuned.tuned_file()) == "/caches/flexdma/tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuned.tuned_file()) == "/home/someone/.cache/flexdma/tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.tuned_file() is None


@pytest.mark.parametrize(
    "changed", [{"torch": "1.0"}, {"triton": "1.0"}, {"device": "x"}, {"group": 3}, {"head_dim": 8}]
)
def test_a_winner_of_other_versions_or_calls_is_not_used(winners, changed):
    block_size = (64, 32)
    store.keep(winners, Winner(here(**changed), block_size, {}, 1.0, 2.0))
    assert default_options.block_size_of(CPU, torch.float32, 16, 2, False) == default_options.BLOCK_SIZE["cpu"]
    store.keep(winners, Winner(here(), block_size, {}, 1.0, 2.0))
    tuned.winners_of.cache_clear()
    assert default_options.block_size_of(CPU, torch.float32, 16, 2, False) == block_size
    assert default_options.block_size_of(CPU, torch.float32, 16, 2, True) == default_options.BLOCK_SIZE["cpu"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 9, "winners": []}', as_json([WINNER]).replace("128, 128", "128, true"), '{"format": 1}'],
)
def test_a_file_that_cannot_be_read_is_named(winners, text, capsys):
    winners.parent.mkdir()
    winners.write_text(text)
    with pytest.warns(
        UserWarning, match=r"tuned\.json: expected JSON that `python -m flexdma tune` wrote, so it is not"
    ):
        assert tuned.winner(KEY) is None
    assert main(["tune", "--list"]) == CANNOT
    assert f"{winners}: expected JSON that tune wrote" in capsys.readouterr().err
    assert main(["tune", "--forget"]) == 0
    assert main(["tune", "--list"]) == 0


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_size_of_the_grid_divides_the_mask_blocks(phase, head_dim, dtype):
    for sizes in sizes_of(phase, head_dim, dtype):
        options = sizes.options(phase)
        assert all(128 % size == 0 for name, size in options.items() if "BLOCK" in name)
        assert phase == "forward" or options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0
        assert phase == "forward" or options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


def test_training_varies_the_backward_after_the_best_forward():
    forward = Sizes(64, 128, 4, 2).options("forward")
    found = candidates("cuda", 64, torch.bfloat16, "training", forward)
    assert all(forward.items() <= each.kernel_options.items() for each in found)
    assert (
        len({tuple(each.kernel_options.items()) for each in found})
        == len(found)
        == len(sizes_of("backward", 64, torch.bfloat16))
    )


def test_without_a_gpu_it_says_so_in_one_line(winners, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == CANNOT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m flexdma tune: --device: expected a CUDA device, found none; --device cpu tunes")
    assert main(["tune", "--device", "cpu", "--phase", "training"]) == CANNOT
    assert "--phase: expected inference with --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_this_cpu_decides_the_blocks_of_later_calls(winners, capsys, monkeypatch):
    monkeypatch.setattr("flexdma.tools.tune.measure.LARGEST_SHARE", float("inf"))  # whatever is measured wins
    small = ["--head-dim", "16", "--heads", "2", "--kv-heads", "1", "--length", "192", "--window", "16"]
    assert main(["tune", "--device", "cpu", *small, "--rounds", "1", "--candidates", "1"]) == 0
    (winner,) = json.loads(winners.read_text())["winners"]
    assert (winner["block_size"], winner["kernel_options"], winner["phase"]) == ([128, 64], {}, "inference")
    printed = capsys.readouterr().out
    assert main(["tune", "--list"]) == 0
    assert printed in capsys.readouterr().out
    query, key, gate = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64)
    with torch.no_grad():
        report = inspect_kernels(dynamic_mask_attention, query, key, key, gate, window_size=8, lowering="flex")
    assert report.attention[0].tiles == {"qBlockSize": 128, "kvBlockSize": 64}
