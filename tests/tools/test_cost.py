"""flexdma.cost compared with counts: blocks, metadata, bytes by the compiler's count, FLOPs, states."""

import importlib.util
import json
import random
from typing import Any

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexdma
from flexdma import cost
from flexdma.__main__ import main
from flexdma.lifespans import Lifespans
from flexdma.packing import packed_layout
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.tools.cost_model import counts
from flexdma.tools.cost_model.kernel_bytes import BYTES
from flexdma.tools.inspect.device_guard import TESTED
from tests.tools.fitted_bytes import CASES, LENGTH, RECORD, counted_bytes, expected_bytes, fitted, packing_peak

SIZES = {"B": 2, "Hq": 8, "Hkv": 2, "D": 64, "Dv": 64, "rows": 128, "columns": 128, "element": 2, "rho": 1.3}


def number(formula, **sizes):
    """A formula's value."""
    return float(formula.xreplace({symbol: sympy.Integer(sizes[symbol.name]) for symbol in formula.free_symbols}))


def test_visited_blocks_of_equal_gates_are_exact():
    draw = random.Random(0)
    checked = {"one period": 0, "several": 0}
    while sum(checked.values()) < 30:
        group, rows, columns = draw.choice([1, 2, 4]), draw.choice([8, 16, 32, 128]), draw.choice([4, 8, 32, 128])
        span = rows // group
        if span % columns and columns % span:
            continue
        length, window = draw.randint(1, 2000), draw.choice([draw.randint(1, 60), draw.randint(1, 2200)])
        sizes = {"Hq": group, "Hkv": 1, "N": length, "w": window, "rows": rows, "columns": columns}
        alive = flexdma.causal_top_w(torch.zeros(1, 1, length), window)
        of_head = FoldedRows(length, group, by_head=False)
        counted = counts.block_counts(alive, of_head, (rows, columns), window)[0].visited
        assert number(cost.visited_blocks(), **sizes) == counted, sizes
        assert number(cost.causal_blocks(), **sizes) == counts.causal_blocks(of_head, (rows, columns)), sizes
        layout = packed_layout(length, length, window, block_size=(rows, columns), group=group)
        checked["several" if layout.periods > 1 else "one period"] += 1
    assert min(checked.values()) >= 10


@pytest.mark.parametrize(("length", "window"), [(50, 8), (50, 50), (20, 300)])
def test_shown_pairs_are_those_of_the_mask(length, window):
    alive = flexdma.causal_top_w(torch.randn(1, 1, length), window)
    assert number(cost.shown_pairs(), N=length, w=window) == (alive.death - alive.birth).sum().item()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("query_heads", [8, 6])  # in blocks of 128 rows, groups of 4 and of 3
@pytest.mark.parametrize(("length", "window"), [(5000, 100), (1000, 100)])  # several periods, and one
def test_metadata_is_what_the_schedule_holds(length, window, query_heads, training):
    bound = torch.empty(2, 2, length, dtype=torch.int32, device="meta")  # on a CPU lists are longer
    sizes = {"capacity": window, "block_size": (128, 128), "transposed": training}
    packing, index = schedule(Lifespans(bound, bound), rows=FoldedRows(length, query_heads // 2), **sizes)
    held: list[Any] = [*packing[: 5 if training else 3], *index.tensors()]  # pieces and starts are for the gradients
    got = cost.forward(training=training).at(**SIZES | {"Hq": query_heads}, N=length, w=window)["metadata"]
    assert got == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("window", [64, 4096])  # packing holds more than making the lists, and less
def test_the_peak_of_narrow_heads_is_packing_or_making_the_lists(window, training):
    _places, _tiles, peak = packing_peak(window, training)
    sizes = SIZES | {"B": 1, "Hq": 4, "Hkv": 1, "D": 1, "Dv": 1}
    got = cost.forward(training=training).at(**sizes, N=LENGTH, w=window)["peak"]
    assert got == pytest.approx(peak, rel=0.03), "refresh with: python -m tests.tools.fitted_bytes"


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.skipif(
    (torch.__version__.split("+")[0], bool(torch.version.cuda)) not in TESTED,
    reason=f"stand-ins for a CUDA device are not known for torch {torch.__version__}",
)
def test_bytes_are_those_that_the_compiler_counts():
    """At sizes that were not used for the fit."""
    cases: list[dict[str, Any]] = [
        {"shape": [2, 4, 4, 900, 32], "window": 500},  # one period, no groups
        {"shape": [2, 8, 2, 1500, 64], "window": 70, "backward": True},
        {"shape": [3, 8, 2, 1, 64], "window": 700, "decode": True},
    ]
    for case, counted in zip(cases, counted_bytes(cases), strict=True):
        assert list(map(float, expected_bytes(**case))) == pytest.approx(counted, rel=0.1), case


def test_the_table_of_bytes_is_what_the_recorded_counts_give():
    counts = json.loads(RECORD.read_text())["counts"]
    assert fitted(counts) == BYTES, "refresh with: python -m tests.tools.fitted_bytes"
    for case, counted in zip(CASES, counts, strict=True):
        assert list(map(float, expected_bytes(**case))) == pytest.approx(counted, rel=0.02), case


def test_decoding_costs_its_state():
    state = flexdma.DynamicMaskState.empty(2, 2, 64, 30, recent=6, dtype=torch.bfloat16)
    got = cost.decode().at(**SIZES, slots=36, gate_element=4)
    held = (state.key, state.value, state.gate, state.position)
    assert got["peak"] == sum(tensor.nbytes for tensor in held)
    # A gradient, because FlopCounterMode counts traced products and not those of the CPU's attention kernel.
    query, key = torch.randn(2, 8, 1, 64).bfloat16().requires_grad_(), torch.randn(2, 2, 1, 64).bfloat16()
    options: dict[str, Any] = {"window_size": 30, "recent": 6, "state": state, "return_state": True}
    with FlopCounterMode(display=False) as counter:
        flexdma.dynamic_mask_attention(query, key, key, torch.randn(2, 2, 1), **options)
    assert got["flops"] == counter.get_total_flops()


def test_ranks_receive_states_and_share_the_rest():
    sizes = SIZES | {"N": 2**20, "w": 1024, "slots": 1030, "gate_element": 4}
    alone, shared = (cost.forward().at(**sizes), cost.context_parallel().at(**sizes, ranks=64))
    assert shared["flops"] == pytest.approx(alone["flops"] / 64, rel=0.01)
    assert alone["bytes"] / 64 < shared["bytes"] < 1.2 * alone["bytes"] / 64
    state = flexdma.DynamicMaskState.empty(2, 2, 64, 1024, recent=6, dtype=torch.bfloat16)
    one = sum(tensor.nbytes for tensor in state.tensors().values()) + 2  # for each row, whether it is one document
    assert shared["received"] == 6 * one
    gradients = (state.key.float(), state.value.float(), state.gate, state.forgotten)
    training = cost.context_parallel(training=True).at(**sizes, ranks=64)
    assert training["received"] == 6 * (one + sum(tensor.nbytes for tensor in gradients))
    assert cost.context_parallel().at(**sizes, ranks=1)["received"] == 0


def test_flops_are_those_of_the_visited_blocks():
    sizes = SIZES | {"N": 4096, "w": 256}
    blocks = number(cost.visited_blocks(), **sizes)
    shown = 4096 * 256 - 256 * 255 / 2
    got = cost.forward().at(**sizes | {"rho": blocks * 128 * 128 / (4 * shown)})["flops"]
    assert got == pytest.approx(2 * 2 * 2 * blocks * 128 * 128 * 128)  # 2 (D + Dv) per pair of a block, B Hkv times


def test_a_missing_or_unknown_size_is_named():
    with pytest.raises(ValueError, match=r"expected w \(keys that a query sees\) too"):
        cost.forward().at(**SIZES, N=100)
    with pytest.raises(ValueError, match="got length"):
        cost.forward().at(**SIZES, length=100, w=3)


def test_the_least_time_is_the_longest_of_what_can_overlap():
    device = cost.Device("d", flops=10.0, bandwidth=5.0, memory=1.0, link=2.0, source="s")
    times = cost.estimate(device, {"flops": 10.0, "bytes": 10.0, "received": 1.0}, achieved=0.5)
    assert times == {"computing": 2.0, "memory": 4.0, "link": 1.0, "least": 5.0}


def test_the_command_answers_for_a_device_and_for_ranks(capsys):
    assert main(["cost", "--tokens", "1048576", "--device", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200 datasheet" in printed
    assert "decode, one token" in printed
    assert main(["cost", "--ranks", "64", "--flops", "1e15", "--bandwidth", "5e12", "--link", "1e11", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["device"]["source"] == "as given"
    row = answer["calls"]["one rank of 64, forward"]
    assert row["link"] == pytest.approx(row["received"] / 1e11)
    assert main(["cost", "--device", "a100", "--tokens", "8388608"]) == 0
    assert "does not fit into 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--query-heads", "3"], "--query-heads: expected a multiple of --kv-heads 4, got 3"),
        (["--ranks", "3"], "--ranks: expected a divisor of 1048576 tokens, got 3"),
        (["--achieved", "2"], "--achieved: expected at most 1, got 2.0"),
        (["--rho", "0.5"], "--rho: expected at least 1, got 0.5"),
        (["--link", "-1"], "--link: expected more than 0, got -1.0"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    assert main(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
