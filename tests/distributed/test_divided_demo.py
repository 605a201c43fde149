"""The demo over several ranks: the losses of one process in every division, and the same bits after an interruption."""

import contextlib
import io
import json
import os
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from flexdma.__main__ import main
from flexdma.tools.byte_models.checkpoint import load_checkpoint
from flexdma.tools.byte_models.model import ByteModel, ModelSizes
from flexdma.tools.byte_models.text import load_text, validation_windows
from flexdma.tools.demo.divided_model import divide
from flexdma.tools.demo.progress import TrainingProgress
from flexdma.tools.demo.ranks import Division
from flexdma.tools.demo.ranks import Ranks as DemoRanks
from flexdma.tools.demo.training import Hyperparameters, train, validate
from tests.distributed.processes import Ranks

SMALL = ["--no-compile", "--context", "32", "--window", "8"]
DIVISIONS = [
    ["--fsdp", "2", "--tensor-parallel", "2"],
    ["--context-parallel", "2", "--fsdp", "2"],
    ["--context-parallel", "2", "--tensor-parallel", "2"],
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"%d times %d is %d.\n" % (a, b, a * b) for a in range(12) for b in range(12)))
    return path


def demo(text, out, *options, ends_at=None):
    """The command on this rank: its exit code, and what it prints.  ends_at: a step that is interrupted."""
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    shown = TrainingProgress.step

    def step(progress, course):
        shown(progress, course)
        if len(course.losses) == ends_at:
            raise KeyboardInterrupt

    printed, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(TrainingProgress, "step", step),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        code = main(["demo", "--text", str(text), "--out", str(out), *SMALL, *options])
    return code, printed.getvalue(), errors.getvalue()


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("division", DIVISIONS, ids=" ".join)
def test_every_division_trains_as_one_process(division, four, text, tmp_path):
    ended = four.run(demo, text, tmp_path, "--steps", "4", *division)
    assert [code for code, _, _ in ended] == [0] * 4
    assert "bits/byte" in ended[0][1]
    assert [printed for _, printed, _ in ended[1:]] == [""] * 3

    loaded = load_text(str(text), 32)
    model = ByteModel("dma-recency", ModelSizes(window=8), recency="slope", seed=0)
    course = train(model, loaded, Hyperparameters(4, 32), compiled=False)
    assert results(tmp_path)["training_bits_per_byte"] == pytest.approx(course.losses, rel=1e-5)
    bits = validate(model, validation_windows(loaded, 32, 64))
    assert results(tmp_path)["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "checkpoint", "training"}
    saved = load_checkpoint(tmp_path / "checkpoint")["dma-recency"].model.state_dict()
    torch.testing.assert_close(saved, model.state_dict(), atol=1e-4, rtol=1e-3)


def compiled(text):
    """The losses of three steps, of heads divided and blocks compiled, and of one process."""
    loaded, losses = load_text(str(text), 32), []
    for backend in ("aot_eager", None):
        model = ByteModel("dma-recency", ModelSizes(window=8), recency="slope", seed=0)
        share = None
        if backend is not None:
            share = DemoRanks(Division(1, 1, 2), torch.device("cpu"), timedelta(seconds=60))
            divide(model, share, backend=backend)
        losses.append(train(model, loaded, Hyperparameters(3, 32), compiled=False, share=share).losses)
    return losses


@pytest.mark.slow
def test_compiled_blocks_train_as_one_process(two, text):
    for divided, one in two.run(compiled, text):
        assert divided == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    "division",
    [["--tensor-parallel", "2"], pytest.param(["--context-parallel", "2"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_a_training_goes_on_with_the_same_bits(division, two, text, tmp_path):
    options = ["--steps", "6", "--save-every", "2", "--deterministic", "--recency", "forget", *division]
    two.run(demo, text, tmp_path / "whole", *options)
    ended = two.run(partial(demo, ends_at=5), text, tmp_path / "parts", *options)
    assert [code for code, _, _ in ended] == [130] * 2
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["training"]
    assert [path.name for path in (tmp_path / "parts" / "training").iterdir()] == ["step-000004"]
    refused = two.run(demo, text, tmp_path / "parts", *options, "--resume", "--window", "9")
    assert "--window: expected 8, as in" in refused[0][2]
    two.run(demo, text, tmp_path / "parts", *options, "--resume")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert results(parts)["training_bits_per_byte"] == results(whole)["training_bits_per_byte"]
    saved, again = (load_checkpoint(out / "checkpoint")["dma-recency"].model.state_dict() for out in (whole, parts))
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--fsdp", "2"],
            "--fsdp 2 x --context-parallel 1 x --tensor-parallel 1: expected as many processes as the product",
        ),
        (["--tensor-parallel", "4"], "--tensor-parallel: expected a divisor of the 2 KV heads, got 4"),
        (["--context-parallel", "4", "--context", "30"], "--context: expected a multiple of --context-parallel 4"),
    ],
)
def test_a_division_that_cannot_be_is_refused(options, message, four, text, tmp_path):
    for code, _, errors in four.run(demo, text, tmp_path / "out", *options):
        assert code == 2
        assert errors.startswith(f"python -m flexdma demo: {message}")
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_processes_need_torchrun(text, tmp_path, capsys):
    assert main(["demo", "--text", str(text), "--out", str(tmp_path / "out"), "--context-parallel", "2"]) == 2
    assert "torchrun --nproc-per-node 2 -m flexdma demo" in capsys.readouterr().err
    assert main(["demo", "--text", str(text), "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "--resume: expected torchrun" in capsys.readouterr().err


def waits():
    """What a call raises on rank 0 that rank 1 does not make, in a group of the demo's meshes."""
    ranks = DemoRanks(Division(1, 2, 1), torch.device("cpu"), timedelta(seconds=1))
    assert ranks.context is not None
    try:
        if ranks.rank == 0:
            torch.distributed.all_reduce(torch.ones(1), group=ranks.context.get_group())
    except RuntimeError as error:
        return str(error)
    return ""


def test_groups_of_meshes_have_the_timeout():
    with Ranks(2) as two:
        assert "Timed out waiting 1000ms" in two.run(waits)[0]
