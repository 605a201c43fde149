"""The demo under torchrun: on real text over four processes, and with a rank that dies or hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--no-compile", "--context", "32", "--window", "8", "--steps", "4", "--save-every", "1"]
# Seconds.  A job takes a few of them; a rank that hangs does for 1,000.
LIMIT = 300
pytestmark = pytest.mark.slow


def torchrun(processes, *arguments):
    """The finished job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)


def test_four_processes_train_on_real_text(tmp_path):
    done = torchrun(4, "flexdma", "demo", "--context-parallel", "2", "--fsdp", "2", *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bits/byte on validation text") == 1
    losses = json.loads((tmp_path / "results.json").read_text())["training_bits_per_byte"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fault", ["dies", "hangs", "is stopped"])
def test_a_rank_that_fails_ends_the_job_with_an_error(fault, tmp_path):
    options = ["--fsdp", "2", *SMALL, "--out", tmp_path, "--timeout", "3"]
    done = torchrun(2, "tests.distributed.faulty_demo", fault, *options)
    assert done.returncode != 0
    assert not (tmp_path / "results.json").exists()
    assert [path.name for path in (tmp_path / "training").glob("step-*")] == ["step-000001"]


def test_a_job_that_is_started_again_goes_on_with_the_same_bits(tmp_path):
    options = ["--fsdp", "2", *SMALL, "--resume", "--out"]
    assert torchrun(2, "tests.distributed.faulty_demo", "dies", *options, tmp_path / "faulty").returncode != 0
    for name in ("faulty", "whole"):
        done = torchrun(2, "flexdma", "demo", *options, tmp_path / name)
        assert done.returncode == 0, done.stderr[-3000:]
    faulty, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("faulty", "whole"))
    assert faulty["training_bits_per_byte"] == whole["training_bits_per_byte"]
    assert faulty["validation_bits_per_byte"] == whole["validation_bits_per_byte"]
