"""inspect: reports of the C++ kernels of this machine, and of kernels given as text."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexdma
from flexdma.__main__ import CANNOT, main
from flexdma.lowerings.default_options import PREFERRED
from flexdma.tools.inspect import Compiled, CompiledForAMD, Kernel, KernelReport, command, grid
from flexdma.tools.inspect.amdgcn import figures_of
from flexdma.tools.inspect.targets import TARGETS, amd_occupancy, occupancy
from flexdma.tools.tile_grid import Sizes

TRITON = """\
BLOCK_M : tl.constexpr = 128
    BLOCK_M : tl.constexpr = 128
    SPARSE_KV_BLOCK_SIZE : tl.constexpr = 128
    QK_HEAD_DIM : tl.constexpr = 64
    # Apply score modification
    tmp5 = tl.load(in_ptr9 + tmp4)
    post_mod_scores = tmp5
    tmp6 = tl.load(in_ptr10 + tmp4)
    post_mod_scores = tl.where(mask_mod_output, post_mod_scores, float("-inf"))
    tl.atomic_add(in_ptr11, tmp5)
"""


def attention_kernel(warps=4, registers=100):
    compiled = Compiled(registers, 0, 0, 0, 1000, 48, 0, 0.5)
    return Kernel("triton_tem_3", "forward", "Triton", TRITON, 1, (4, 1, 1), warps, 3, compiled=compiled)


def report_of(*kernels):
    return KernelReport(
        "a device", "2.13.0", "3.9.0", list(kernels), {"forward": ["aten.sort.stable"] * 2}, {"forward": ["pass"]}
    )


@pytest.fixture(scope="module")
def report():
    query, key, gate = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64)
    with torch.no_grad():
        return flexdma.inspect_kernels(
            flexdma.dynamic_mask_attention, query, key, key, gate, window_size=8, lowering="flex"
        )


def test_what_is_read_off_a_source():
    kernel = attention_kernel()
    assert kernel.tiles == {"BLOCK_M": 128, "SPARSE_KV_BLOCK_SIZE": 128}
    assert (kernel.gate_lines, kernel.mask_lines, kernel.atomic_lines) == ([6], [9], [10])


def test_a_report_of_this_machine(report):
    (kernel,) = report.attention
    assert (kernel.language, kernel.phase, kernel.launches) == ("C++", "forward", 1)
    assert kernel.tiles == {"qBlockSize": 128, "kvBlockSize": 32}
    lines = kernel.source.splitlines()
    assert kernel.gate_lines
    assert all("in_ptr" in lines[number - 1] for number in kernel.gate_lines)
    assert ["block mask" in lines[number - 1] for number in kernel.mask_lines] == [True]
    assert kernel.name in str(report)
    assert "flexdma.lifespans.default" in report.other_calls["forward"]


def test_a_second_look_sees_the_same(report):
    tensors = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64)
    with torch.no_grad():
        again = flexdma.inspect_kernels(flexdma.dynamic_mask_attention, *tensors, window_size=8, lowering="flex")
    assert report.diff(again).changes() == {}
    assert report.diff(again).source() == ""


def test_the_backward_of_a_module_is_seen():
    module = flexdma.DynamicMaskAttention(32, 2, 1, 16, window_size=8)
    seen = flexdma.inspect_kernels(module, torch.randn(1, 48, 32))
    assert seen.launches("forward") > 0
    assert seen.launches("backward") > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_an_operator_is_known_where_it_calls_only_operators_of_torch():
    query, key = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
    alive = flexdma.causal_top_w(torch.randn(1, 1, 64), 8)
    seen = flexdma.inspect_kernels(flexdma.lifespan_attention, query, key, key, alive, capacity=8, lowering="dense")
    assert seen.launches("forward") > 0
    assert not any("flexdma" in name for name in seen.other_calls["forward"])


def test_a_report_survives_json_and_is_saved(report, tmp_path):
    again = KernelReport.from_json(report.to_json())
    assert again == report
    files = report.save(tmp_path / "kernels")
    assert {path.suffix for path in files} == {".cpp", ".py", ".json"}
    assert all(path.read_text() for path in files)


def test_a_diff_names_what_changed():
    difference = report_of(attention_kernel()).diff(report_of(attention_kernel(warps=8, registers=64)))
    assert difference.changes() == {"forward warps": (4, 8), "forward registers": (100, 64)}
    assert "forward warps      4 -> 8" in str(difference)
    assert str(report_of().diff(report_of())) == "no difference in the figures"


def test_occupancy_counts_registers_shared_memory_and_warps():
    target = TARGETS["sm_90"]
    assert occupancy(target, registers=32, shared_bytes=0, warps=4) == 1.0
    assert occupancy(target, registers=255, shared_bytes=0, warps=4) == 8 / 64
    assert occupancy(target, registers=32, shared_bytes=117760, warps=4) == 4 / 64


def test_occupancy_on_amd_counts_vector_registers_and_shared_memory():
    """As LLVM computes it: 2 waves per SIMD with 256 vector registers, 1 with 361."""
    target = TARGETS["gfx942"]
    assert amd_occupancy(target, 64, 0, warps=4) == 1.0
    assert amd_occupancy(target, 256, 24576, warps=8) == 2 / 8
    assert amd_occupancy(target, 361, 16384, warps=4) == 1 / 8
    assert amd_occupancy(target, 64, 40000, warps=4) == 4 / 32


def test_figures_of_amd_code_come_from_its_metadata():
    instructions = "\tv_mfma_f32_32x32x8_bf16 a[0:15]\n\tv_add_f32 v1\n\tbuffer_atomic_add_f32 v0\n"
    metadata = "  - .agpr_count:     8\n    .private_segment_fixed_size: 24\n    .sgpr_count:     106\n"
    metadata += "    .sgpr_spill_count: 3\n    .vgpr_count:     264\n    .vgpr_spill_count: 5\n"
    figures = figures_of(instructions + metadata, 16384, 4, TARGETS["gfx942"])
    assert figures == CompiledForAMD(264, 8, 106, 5, 3, 24, 16384, 1, 1, 1 / 8)
    with pytest.raises(RuntimeError, match=r"expected \.vgpr_count in the metadata of Triton's assembly for gfx942"):
        figures_of(instructions, 16384, 4, TARGETS["gfx942"])
    kernel = Kernel("k", "forward", "Triton", TRITON, compiled=figures)
    assert Kernel.from_dict(json.loads(json.dumps(kernel.to_dict()))) == kernel


GRID = Path(__file__).parents[2] / "docs" / "results" / "kernel-grid-sm_90.json"


def test_the_grid_is_compiled_once_and_two_kernels_at_a_time():
    asked = []

    def inspect(options):
        asked.append(options)
        figures = Compiled(len(asked), 0, 0, 0, 1024, 48, 0, 0.5)
        gradients = TRITON.replace("BLOCK_M", "BLOCK_M1")
        kernels = [("forward", TRITON), ("backward", gradients), ("backward", TRITON)]  # the last one of the gate
        return report_of(*(Kernel("k", phase, "Triton", source, compiled=figures) for phase, source in kernels))

    records = [record for new in grid.compiled_pairs("bfloat16", 64, [], inspect) for record in new]
    assert len(asked) == 16 == len(records) / 2
    assert asked[2]["fwd_num_warps"] == asked[2]["bwd_num_warps"] == 4
    assert [
        record.registers for record in records if record.sizes.options(record.phase).items() <= asked[2].items()
    ] == [3, 3]
    missing = records[1:]
    assert [len(new) for new in grid.compiled_pairs("bfloat16", 64, missing, inspect)] == [2] + 15 * [0]
    about = {"target": "sm_90"}
    assert grid.from_json(grid.to_json(about, records)) == (about, sorted(records))
    with pytest.raises(ValueError, match="columns: expected"):
        grid.from_json("{}")


def test_the_chosen_sizes_have_no_spills_and_inductors_have():
    _, records = grid.from_json(GRID.read_text())
    spills = {
        (record.dtype, record.head_dim, tuple(record.sizes.options(record.phase).items())): record.spill_stores
        + record.spill_loads
        for record in records
    }
    for (itemsize, _, largest), options in PREFERRED[9, 0].items():
        dtype = {2: "bfloat16", 4: "float32"}[itemsize]
        for phase in {name[:4] for name, _ in options}:
            chosen = tuple(option for option in options if option[0].startswith(phase))
            assert spills[dtype, largest, chosen] == 0
    assert spills["bfloat16", 64, tuple(Sizes(128, 128, 4, 3).options("forward").items())] == 90


@pytest.mark.parametrize("phase", grid.PHASES)
def test_the_guide_shows_the_recorded_grid(phase):
    _, records = grid.from_json(GRID.read_text())
    assert grid.table(records, phase) in (GRID.parents[1] / "kernels.md").read_text()


def test_a_grid_needs_a_gpu_of_nvidia(capsys, tmp_path):
    for target in ([], ["--target", "gfx942"]):
        assert main(["inspect", *target, "--grid", str(tmp_path / "grid.json")]) == CANNOT
        assert "--grid: expected --target with an NVIDIA GPU" in capsys.readouterr().err


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sm_80' .*'sm_90' .*'sm_100' .*got 'sm_75'"):
        flexdma.inspect_kernels(torch.relu, torch.ones(2), target="sm_75")


def test_something_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"expected a function or an nn\.Module, got Tensor"):
        flexdma.inspect_kernels(torch.ones(2), torch.ones(2))  # type: ignore[arg-type]  # refused


def test_a_function_without_attention_is_named():
    def doubled(x):
        return torch.relu(x) * 2

    with pytest.raises(ValueError, match=r"calls flexdma or FlexAttention, but in .*doubled there is 1 other kernel"):
        flexdma.inspect_kernels(doubled, torch.ones(64))


def test_importing_flexdma_does_not_import_the_compiler():
    code = "import flexdma, sys; sys.exit('torch._inductor.graph' in sys.modules or 'flexdma.tools.inspect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*SMALL, *arguments])


SMALL = ["--keys", "64", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--window", "8", "--training", "no"]


@pytest.mark.slow
def test_the_command_compares_two_settings(capsys):
    assert command.run(parsed("--lowering", "flex", "--diff", "block-size=64", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["forward kvBlockSize"] == [32, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diff", "window"], "expected KEY=VALUE, got 'window'"),
        (["--diff", "window=wide"], "--diff: window: expected a whole number, got 'wide'"),
        (["--diff", "selection=best"], "--diff: selection: expected one of causal, global, threshold, got 'best'"),
        (["--kernel-option", "num_warps=many"], "--kernel-option: expected a whole number, got 'many'"),
        (["--heads", "3", "--kv-heads", "2"], "expected a multiple of key's 2 heads, got 3"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    assert main(["inspect", *SMALL, *arguments]) == CANNOT
    assert message in capsys.readouterr().err
