"""The kernels generated for a GPU, tested without one.

In Triton's interpreter their results equal the dense specification, and differ when the gate is dropped or the mask
shifted.  Compiled, they have the registers, spills and atomics recorded in kernels.json.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexdma import inspect_kernels
from flexdma.tools.inspect.device_guard import TESTED
from tests.lowerings.interpreted_kernels import CASES
from tests.lowerings.recorded_kernels import RECORD, SETTINGS, figures

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Inputs and, before each matrix product, weights are rounded to the dtype, and results too.  The error of 4 roundings is at
# most 2 epsilons of each term.  float32 sums of a few hundred terms of both signs need more.
ALLOWED = {torch.finfo(torch.bfloat16).eps: 2, torch.finfo(torch.float32).eps: 32}

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton"),
    pytest.mark.skipif(
        (torch.__version__.split("+")[0], bool(torch.version.cuda)) not in TESTED,
        reason=f"stand-ins for a CUDA device are not known for torch {torch.__version__}",
    ),
]


# Triton 3.6's interpreter turns arrays of one element into Python numbers, which NumPy 2.4 refuses.
needs_the_interpreter = pytest.mark.skipif(
    HAS_TRITON
    and importlib.metadata.version("triton").startswith("3.6")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="needs the interpreter of Triton 3.8 or newer, or NumPy before 2.4",
)


# The longest of those whose parts other cases also have.
LONG = {
    "causal, rows by head, small blocks, many periods, learned sinks, float32",
    "causal, batch, few queries, learned sinks, bfloat16",
    "causal, rows by head, the gate's gradient by a column, bfloat16",
    "global, grouped, odd length, the gate's gradient by atomics, bfloat16",
    "inference, batch, one KV head, blocks of 64 keys, several periods, bfloat16",
    "inference, one gate for all heads, bfloat16",
    "sm_90, D = 64, float64 gates",
    "sm_90, D = 128, the gate's gradient by atomics",
    "gfx942, D = 64",
}


def each(names):
    """The names, of which LONG ones run with `-m slow`."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names]


def interpreted(program, *arguments):
    """The lines that a program of this folder prints, where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"tests.lowerings.{program}", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_the_interpreter
@pytest.mark.parametrize("case", each(CASES))
def test_generated_kernels_agree_with_the_specification(case):
    results = interpreted("interpreted_kernels", case)
    sound = [result for result in results if result["control"] is None]
    assert len(sound) == len(CASES[case]["gates"])
    assert len(results) - len(sound) == (2 if CASES[case].get("controls") else 0)
    for result in sound:
        assert result["cuda_graph_obstacles"] == []
        assert result["partial_blocks"] > 0
        if CASES[case].get("deterministic"):
            assert result["atomics"] == 0
        allowed = ALLOWED[result["epsilon"]] * result["epsilon"]
        assert {name: error for name, error in result["errors"].items() if not error <= allowed} == {}, result
    for result in results:
        if result["control"] is not None:
            assert min(result["errors"].values()) > 0.05, f"{result['control']} went unnoticed: {result}"
    if CASES[case].get("selection") == "global":
        assert sound[0]["full_blocks"] > 0


@pytest.mark.slow
@needs_the_interpreter
def test_generated_kernels_compute_the_attention_mass():
    """The inputs are in bfloat16; nothing else is rounded to it."""
    (result,) = interpreted("interpreted_mass")
    assert result["graphs"] == 1
    assert result["atomics"] == 0
    assert result["dtype"] == "torch.float32"
    assert len(result["errors"]) == 2
    assert max(result["errors"]) < 1e-5, result


@needs_the_interpreter
@pytest.mark.slow
def test_generated_kernels_of_several_intervals():
    """Output and all gradients, each interval's bias included, in bfloat16."""
    (result,) = interpreted("interpreted_intervals")
    assert len(result["errors"]) == 6
    assert max(result["errors"].values()) < 2 * torch.finfo(torch.bfloat16).eps, result


@pytest.mark.parametrize("setting", each(SETTINGS))
def test_kernels_take_what_is_recorded(setting):
    recorded = json.loads(RECORD.read_text())
    have = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    if recorded["versions"] != have:
        pytest.skip(f"kernels.json was recorded with {recorded['versions']}, here is {have}")
    found = figures(setting)
    assert found == recorded["settings"][setting], "refresh with: python -m tests.lowerings.recorded_kernels"
    # The backward at D = 128 spills in the tile that was the fastest on a GPU.
    spilling = {"backward"} if "D = 128" in setting else set()
    for phase, kernel in found.items():
        if "sm_90" in setting and phase not in spilling:
            assert kernel["spill_stores"] == kernel["spill_loads"] == 0


def test_a_function_that_another_process_cannot_import_is_refused():
    with pytest.raises(TypeError, match="another process imports it"):
        inspect_kernels(lambda x: x, torch.ones(2), target="sm_90")


def without_attention(x):
    """A function that compiles to a kernel without attention."""
    return torch.relu(x) * 2


@pytest.mark.parametrize(
    ("called", "named"),
    [(without_attention, "without_attention there is 1 other"), (torch.nn.Linear(64, 8), "Linear there is")],
)
def test_a_function_without_attention_is_named(called, named):
    with pytest.raises(ValueError, match=f"calls flexdma or FlexAttention, but in {named}"):
        inspect_kernels(called, torch.ones(64), target="sm_90")
