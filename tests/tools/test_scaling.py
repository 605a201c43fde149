"""A sequence over many devices: the schedules of the scan are run, messages of other ways counted; docs/scaling.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from flexdma import cost
from flexdma.__main__ import main
from flexdma.distributed import context_parallel_dynamic_mask_attention
from flexdma.tools.cost_model.calls import evaluated
from flexdma.tools.cost_model.prefix_scan import chain, doubling, received_messages, simulated
from flexdma.tools.cost_model.rank_seconds import Links, ring_seconds, scan_seconds, ulysses_seconds
from flexdma.tools.cost_model.sequence_parallel import message, returned_message
from tests.distributed.processes import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SIZES = {"B": 2, "Hq": 8, "Hkv": 4, "D": 6, "Dv": 3, "element": 2}
COUNTS = [1, 2, 3, 4, 5, 8, 13, 64]


def scanned(rounds, own, join):
    """What each rank has of all earlier ranks after these rounds; None on rank 0.  own: the state of each rank's tokens.

    What a rank receives comes before what it has: it is joined to both, and the message of the next round includes it.
    """
    before: list[Any] = [None] * len(own)
    through = list(own)  # what a rank sends: its own state, after those that it received
    for messages in rounds:
        sent = [(destination, through[source]) for source, destination in messages]
        for destination, state in sent:
            earlier = before[destination]
            before[destination] = state if earlier is None else join(state, earlier)
            through[destination] = join(state, through[destination])
    return before


@pytest.mark.parametrize("schedule", [doubling, chain])
@pytest.mark.parametrize("ranks", COUNTS)
def test_each_rank_gets_all_earlier_ranks_in_order_and_once(schedule, ranks):
    before = scanned(schedule(ranks), [[rank] for rank in range(ranks)], lambda first, second: first + second)
    assert before[0] is None
    assert before[1:] == [list(range(rank)) for rank in range(1, ranks)]


@pytest.mark.parametrize("ranks", COUNTS)
def test_doubling_has_log_depth_and_a_chain_one_message_for_each_rank(ranks):
    assert len(doubling(ranks)) == (ranks - 1).bit_length()
    assert received_messages(doubling(ranks), ranks) == [rank.bit_length() for rank in range(ranks)]
    assert len(chain(ranks)) == ranks - 1
    assert received_messages(chain(ranks), ranks) == [min(rank, 1) for rank in range(ranks)]


def test_simulated_times_are_those_of_the_longest_chain_of_messages():
    def alike(source, destination):
        return 2.0

    assert simulated(doubling(8), [0.0] * 8, alike, 0.5) == [0.0, 2.5, 4.5, 5.0, 6.5, 7.0, 7.0, 7.5]
    assert simulated(chain(8), [0.0] * 8, alike, 0.5) == [2.5 * rank for rank in range(8)]
    # Rank 1 is late by 10, and those who need what it sends wait.
    assert simulated(doubling(4), [0.0, 10.0, 0.0, 0.0], alike, 0.5) == [0.0, 10.5, 13.0, 14.5]
    # A slow link between ranks 1 and 2 delays what passes it.
    slow = simulated(chain(4), [0.0] * 4, lambda source, _: 100.0 if source == 1 else 2.0, 0.5)
    assert slow == [0.0, 2.5, 103.0, 105.5]


def test_links_within_a_node_and_between_nodes():
    device = cost.Device("d", flops=1.0, bandwidth=30.0, memory=1.0, link=10.0, source="s", network=2.0, node=4)
    links = Links(device, latency=0.5, achieved=0.5)
    assert [links.message(a, b, 20.0) for a, b in ((0, 3), (3, 4), (4, 7))] == [4.5, 20.5, 4.5]
    join = 3 * 20.0 / 15
    assert scan_seconds(links, 4, 20.0) == 2 * (4.5 + join)
    # Rank 3 sends to ranks 4, 5 and 7, over the network and one message after another.
    assert scan_seconds(links, 8, 20.0) == 3 * 20.5 + join
    work = {"flops": 0.5, "bytes": 0.0, "received": 20.0}  # one second of computing
    assert ring_seconds(links, 4, work, passes=2) == 2 * 3 * 0.5 + 20 / 5
    assert ring_seconds(links, 8, work, passes=1) == 7 * 0.5 + 20 / 1
    assert ring_seconds(links, 1, work, passes=1) == 1.0
    assert ulysses_seconds(links, 4, work, passes=1) == 1 + 2 * (0.5 + 10 / 5)
    assert ulysses_seconds(links, 8, work, passes=1) == pytest.approx(1 + 2 * (0.5 + 10 * (4 / 7) / 1))


@pytest.mark.parametrize(("ranks", "mebibytes"), [(1, 0), (2, 8), (4, 10)])
def test_ring_attention_receives_what_that_of_torch_does(ranks, mebibytes):
    """Counted in its forward and backward, with 4,096 tokens of two heads in float32 (docs/distributed.md)."""
    sizes = {"B": 1, "Hq": 2, "Hkv": 2, "D": 64, "Dv": 64, "element": 4, "N": 4096, "ranks": ranks}
    assert cost.ring_attention(training=True).at(**sizes)["received"] == mebibytes * 2**20


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_other_ways_receive_what_their_messages_hold(ranks):
    length = 64
    rows, heads = SIZES["B"] * length // ranks, {"q": SIZES["Hq"], "kv": SIZES["Hkv"]}
    block = rows * heads["kv"] * (SIZES["D"] + SIZES["Dv"])  # keys and values of a rank
    sizes = SIZES | {"N": length, "ranks": ranks}
    assert cost.ring_attention().at(**sizes)["received"] == sum(2 * block for _step in range(ranks - 1))
    assert cost.ring_attention(training=True).at(**sizes)["received"] == block * (2 * 2 * (ranks - 1) + 4 * ranks)
    # Each rank gets some heads of each other rank's tokens, and returns their outputs.
    own = {"q": heads["q"] // ranks, "kv": max(1, heads["kv"] // ranks)}
    from_each = rows * (own["q"] * SIZES["D"] + own["kv"] * (SIZES["D"] + SIZES["Dv"]))
    returned = rows * own["q"] * SIZES["Dv"]
    assert cost.ulysses().at(**sizes)["received"] == pytest.approx(2 * (ranks - 1) * (from_each + returned))
    flops = 2 * (SIZES["D"] + SIZES["Dv"]) * SIZES["B"] * SIZES["Hq"] * length * (length + 1) / 2 / ranks
    assert cost.ring_attention().at(**sizes)["flops"] == cost.ulysses().at(**sizes)["flops"] == flops


def test_several_sizes_are_compared(capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- scaling -->\nold\n<!-- end of scaling -->\nbelow\n")
    request = ["cost", "--tokens", "65536", "131072", "--ranks", "8", "64", "--window", "256"]
    assert main([*request, "--markdown", str(page)]) == 0
    printed = capsys.readouterr().out
    assert page.read_text().startswith("above\n<!-- scaling -->\n\nNVIDIA H200 SXM")
    tables = page.read_text().partition("-->\n\n")[2].partition("\n\n<!-- end")[0]
    assert printed.startswith(tables)
    assert tables.count("\n|---:") == 4
    assert main([*request, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(case["tokens"], case["ranks"]) for case in answer["cases"]] == [
        (tokens, ranks) for tokens in (65536, 131072) for ranks in (8, 64)
    ]
    assert [case["ulysses"] is None for case in answer["cases"]] == [False, True] * 2  # 16 query heads
    received = [case["dma"]["received"] for case in answer["cases"]]
    assert received[:2] == received[2:]  # at any length
    assert received[1] == 2 * received[0]
    sizes = {"B": 1, "Hkv": 4, "D": 128, "Dv": 128, "slots": 256, "element": 2, "gate_element": 4}
    one = evaluated(message(), sizes)
    assert [scan["received"] for scan in answer["scans"]] == [3 * one, 6 * one]


def test_options_of_the_comparison_need_several_sizes(capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("")
    for option, value in (("--markdown", str(page)), ("--network", "1e9"), ("--latency", "1e-6")):
        assert main(["cost", option, value]) == 2
        assert f"{option}: expected several --tokens or --ranks with it, got one of each" in capsys.readouterr().err
    assert main(["cost", "--ranks", "2", "4", "--markdown", str(page)]) == 2
    assert "expected the lines '<!-- scaling -->'" in capsys.readouterr().err


def test_the_page_of_the_docs_is_what_its_command_makes(capsys, tmp_path):
    page = tmp_path / "scaling.md"
    page.write_text(PAGE.read_text())
    (command,) = re.findall(
        r"^    python -m flexdma (cost .*) --markdown docs/scaling.md$", PAGE.read_text(), re.MULTILINE
    )
    assert main([*command.split(), "--markdown", str(page)]) == 0
    assert page.read_text() == PAGE.read_text(), f"python -m flexdma {command} --markdown docs/scaling.md"


class Received(TorchDispatchMode):
    """Bytes that this rank receives in each all-to-all, in order; messages are bytes."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            assert args[0].dtype == torch.uint8
            self.bytes.append(sum(args[1]))
        return func(*args, **(kwargs or {}))


def received_by_round(ranks, dtype, sizes, options):
    """On one rank, what it receives in each round of the forward and of the backward."""
    mesh = DeviceMesh("cpu", list(range(ranks)))
    if mesh.get_coordinate() is None:
        return None
    query, key, value = (
        torch.randn(sizes["B"], heads, 20, size, dtype=dtype, requires_grad=True)
        for heads, size in ((sizes["Hq"], sizes["D"]), (sizes["Hkv"], sizes["D"]), (sizes["Hkv"], sizes["Dv"]))
    )
    gate = torch.randn(sizes["B"], sizes["Hkv"], 20, requires_grad=True)
    with Received() as forward:
        output = context_parallel_dynamic_mask_attention(query, key, value, gate, mesh=mesh, **options)
    with Received() as backward:
        output.sum().backward()
    return forward.bytes, backward.bytes


def test_the_messages_of_the_operator_are_those_of_the_simulation():
    options = {"window_size": 7, "sinks": 1, "recent": 2}
    with Ranks(4) as group:
        for ranks, dtype in ((4, torch.float32), (2, torch.bfloat16)):
            sizes = SIZES | {"slots": 10, "gate_element": 4, "element": dtype.itemsize}
            one, returned = (int(evaluated(formula(), sizes)) for formula in (message, returned_message))
            rounds = doubling(ranks)
            arriving = [[one * ((rank - 2**k, rank) in sent) for k, sent in enumerate(rounds)] for rank in range(ranks)]
            back = [
                [returned * ((rank, rank + 2**k) in sent) for k, sent in reversed(list(enumerate(rounds)))]
                for rank in range(ranks)
            ]
            measured = group.run(received_by_round, ranks, dtype, sizes, options)
            assert measured[:ranks] == list(zip(arriving, back, strict=True))
