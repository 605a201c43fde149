"""flexdma.cost against what is counted: blocks and metadata exactly, bytes as the compiler counts them, FLOPs, states."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexdma
from flexdma import cost
from flexdma.__main__ import main
from flexdma.bench.timing import peak_bytes
from flexdma.block_metadata import block_metadata
from flexdma.explanation import counts
from flexdma.lowerings import flex

ROOT = Path(__file__).parent.parent
SIZES = {"B": 2, "Hq": 8, "Hkv": 2, "D": 64, "Dv": 64, "rows": 128, "columns": 128, "element": 2, "rho": 1.3}


def visited(gate, window, group, rows, columns):
    """Blocks per head in the operator's own metadata, keys packed."""
    alive = counts.packed(flexdma.causal_top_w(gate, window), window)
    partial, _, full, _ = block_metadata(*alive, gate.shape[-1], group, rows, columns, False)
    return (partial + full).sum().item()


def test_visited_blocks_of_equal_gates_are_exact():
    draw = random.Random(0)
    formula = cost.visited_blocks()
    checked = 0
    while checked < 30:
        group, rows, columns = draw.choice([1, 2, 4]), draw.choice([8, 16, 32, 128]), draw.choice([4, 8, 32, 128])
        span = rows // group
        if span % columns and columns % span:
            continue
        length, window = draw.randint(1, 700), draw.randint(1, 800)
        sizes = {"Hq": group, "Hkv": 1, "N": length, "w": window, "rows": rows, "columns": columns}
        got = formula.subs({symbol: sizes[symbol.name] for symbol in formula.free_symbols})
        assert got == visited(torch.zeros(1, 1, length), window, group, rows, columns), sizes
        causal = cost.causal_blocks()
        got = causal.subs({symbol: sizes[symbol.name] for symbol in causal.free_symbols})
        assert got == counts.causal_blocks(length, group, (rows, columns)), sizes
        checked += 1


@pytest.mark.parametrize(("length", "window"), [(50, 8), (50, 50), (20, 300)])
def test_shown_pairs_are_those_of_the_mask(length, window):
    alive = flexdma.causal_top_w(torch.randn(1, 1, length), window)
    formula = cost.shown_pairs()
    sizes = {"N": length, "w": window}
    assert formula.subs({s: sizes[s.name] for s in formula.free_symbols}) == (alive.death - alive.birth).sum().item()


@pytest.mark.parametrize("training", [False, True])
def test_metadata_is_what_the_schedule_holds(training):
    alive = flexdma.causal_top_w(torch.randn(2, 2, 1000), 100)
    schedule = flex._schedule(*alive, 1000, 4, 100, 128, 128, training)
    inverse = 8 * alive.birth.numel() if training else 0
    got = cost.forward(training=training).at(**SIZES, N=1000, w=100)["metadata"]
    assert got == sum(tensor.nbytes for tensor in schedule) + inverse


@pytest.mark.parametrize("training", [False, True])
def test_the_peak_of_long_sequences_is_building_the_metadata(training):
    alive = counts.packed(flexdma.causal_top_w(torch.randn(1, 1, 65536), 64), 64)
    most = flex._most_visited(torch.empty(1, 1, 65536, device="meta"), 1, 64, 128, 128)
    sizes = SIZES | {"B": 1, "Hq": 1, "Hkv": 1, "D": 1, "Dv": 1}
    got = cost.forward(training=training).at(**sizes, N=65536, w=64)["peak"]
    measured = peak_bytes(lambda: block_metadata(*alive, 65536, 1, 128, 128, training, most))
    assert got == pytest.approx(measured, rel=0.1)


@pytest.mark.kernels
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
def test_bytes_are_those_that_the_compiler_counts():
    """At sizes other than those that the numbers per key and block were taken from."""
    cases = [
        {"shape": [2, 8, 2, 16384, 64], "window": 512},
        {"shape": [2, 8, 2, 16384, 64], "window": 512, "backward": True},
        {"shape": [3, 8, 2, 1, 64], "window": 700, "decode": True},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.counted_bytes"], input="\n".join(map(json.dumps, cases)), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (inference,), (forward, backward), (decode,) = map(json.loads, done.stdout.splitlines())
    sizes = SIZES | {"N": 16384, "w": 512}
    assert cost.forward().at(**sizes)["bytes"] == pytest.approx(inference, rel=0.1)
    assert cost.forward(training=True).at(**sizes)["bytes"] == pytest.approx(forward, rel=0.1)
    assert cost.backward().at(**sizes)["bytes"] == pytest.approx(backward, rel=0.1)
    state = SIZES | {"B": 3, "slots": 700, "gate_element": 4}
    assert cost.decode().at(**state)["bytes"] == pytest.approx(decode, rel=0.1)


def test_decoding_costs_its_state():
    state = flexdma.DynamicMaskState.empty(2, 2, 64, 30, recent=6, dtype=torch.bfloat16)
    got = cost.decode().at(**SIZES, slots=36, gate_element=4)
    held = (state.key, state.value, state.gate, state.position)
    assert got["peak"] == sum(tensor.nbytes for tensor in held)
    query, key = torch.randn(2, 8, 1, 64).bfloat16(), torch.randn(2, 2, 1, 64).bfloat16()
    options = {"window_size": 30, "recent": 6, "state": state, "return_state": True}
    with FlopCounterMode(display=False) as counter:
        flexdma.dynamic_mask_attention(query, key, key, torch.randn(2, 2, 1), **options)
    assert got["flops"] == counter.get_total_flops()


def test_ranks_receive_states_and_share_the_rest():
    sizes = SIZES | {"N": 2**20, "w": 1024, "gate_element": 4}
    alone, shared = (cost.forward().at(**sizes), cost.context_parallel().at(**sizes, ranks=64))
    assert shared["flops"] == pytest.approx(alone["flops"] / 64, rel=0.01)
    state = flexdma.DynamicMaskState.empty(2, 2, 64, 1024, dtype=torch.bfloat16)
    one = sum(tensor.nbytes for tensor in (state.key, state.value, state.gate, state.position))
    assert shared["received"] == 6 * one
    assert shared["received"] < cost.full_attention().at(**sizes, ranks=64)["received"] / 80
    training = cost.context_parallel(training=True).at(**sizes, ranks=64)
    assert training["received"] == 6 * (2 * one - state.position.nbytes)
    assert cost.context_parallel().at(**sizes, ranks=1)["received"] == 0


def test_flops_are_those_of_the_visited_blocks():
    sizes = SIZES | {"N": 4096, "w": 256}
    blocks = cost.visited_blocks()
    number = float(blocks.subs({symbol: sizes[symbol.name] for symbol in blocks.free_symbols}))
    shown = 4096 * 256 - 256 * 255 / 2
    got = cost.forward().at(**sizes | {"rho": number * 128 * 128 / (4 * shown)})["flops"]
    assert got == pytest.approx(2 * 2 * 2 * number * 128 * 128 * 128)  # 2 (D + Dv) per pair of a block, B Hkv times


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
    assert main(["cost", "--device", "a100", "--tokens", "4194304"]) == 0
    assert "does not fit into 80 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--query-heads", "3"], "--query-heads: expected a multiple of 4, got 3"),
        (["--ranks", "3"], "--ranks: expected a divisor of 1048576 tokens, got 3"),
        (["--achieved", "2"], "--achieved: expected a share in (0, 1], got 2.0"),
        (["--rho", "0.5"], "--rho: expected at least 1, got 0.5"),
        (["--link", "-1"], "--link: expected more than 0, got -1.0"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    assert main(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
