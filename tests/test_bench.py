"""The benchmark's parts, without a timing: medians, memory, families, the report, refusals."""

import pytest
import torch

from flexdma.__main__ import main
from flexdma.bench import cases, report
from flexdma.bench.families import _autoregressive, gate_families
from flexdma.bench.timing import interleaved, peak_bytes


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, lambda name: None)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_peak_memory_counts_what_is_freed_again():
    def function():
        torch.zeros(1 << 20)  # 4 MiB, freed at once
        return torch.zeros(1 << 18)

    assert 4 << 20 <= peak_bytes(function) < 6 << 20


def test_masks_and_metadata_are_far_from_a_dense_mask():
    shape = cases.Shape(8192, 128, False)
    gate = cases.inputs(shape, "cpu", torch.float32)[3]
    for build in cases.mask_memory(shape, gate).values():
        assert peak_bytes(build) < shape.length**2 / 4


def test_there_are_seven_families_and_packing_helps_in_each():
    assert len(gate_families(256)) == 7
    for natural, packed in cases.packing_ratios(4096, 256, 64, 64).values():
        assert 1 <= packed < natural


def test_the_autoregressive_family_is_its_recurrence():
    noise = torch.randn(50, dtype=torch.float64)
    want = [noise[0]]
    for step in noise[1:]:
        want.append(0.98 * want[-1] + step)
    torch.testing.assert_close(_autoregressive(noise, 0.98), torch.stack(want))


def test_the_report_divides_by_the_first_contender():
    results = {
        "machine": {"device": "x"}, "dtype": "float32", "rounds": 1, "heads": "h",
        "calls": [{"shape": "s", "seconds": {"SDPA causal": 3.0, "flexdma": 1.5}}],
        "stages": [], "packing": [], "memory": [],
    }  # fmt: skip
    assert "| s | flexdma | 1.5000 | 2.00 x |" in report.markdown(results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_needs_a_gpu(capsys):
    assert main(["bench", "--suite", "gpu"]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
