"""`python -m flexdma cost`: the cost of a size on one or more devices, at the rates of their data sheet."""

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from flexdma.atomic_write import atomic_write
from flexdma.lowerings.default_options import default_block_size
from flexdma.tools import arguments as types
from flexdma.tools.cost import (
    DEVICES,
    Cost,
    Device,
    backward,
    context_parallel,
    decode,
    estimate,
    forward,
    full_attention,
)
from flexdma.tools.cost.comparison import WAYS, compared, markdown, scans
from flexdma.tools.cost_model.rank_seconds import Links
from flexdma.tools.marks import between
from flexdma.tools.refusal import refusing

COLUMNS = (
    ("TFLOP", "flops", 1e12), ("moved, GB", "bytes", 1e9), ("metadata, MB", "metadata", 1e6), ("peak, MB", "peak", 1e6),
    ("received, MB", "received", 1e6), ("computing, ms", "computing", 1e-3), ("memory, ms", "memory", 1e-3),
    ("link, ms", "link", 1e-3), ("at least, ms", "least", 1e-3),
)  # fmt: skip

LATENCY = 1e-5  # seconds; assumed, as data sheets have none
RATES = ("flops", "bandwidth", "link", "network")
LEAST = "Least times, not predictions: every kernel at these rates, without launches and waiting."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sizes = (
        ("--batch", 1, "B"), ("--window", 1024, "w, the keys that a query sees"),
        ("--query-heads", 16, "Hq"), ("--kv-heads", 4, "Hkv"), ("--head-dim", 128, "D and Dv"),
        ("--element", 2, "bytes per number of query, key, value and output"),
    )  # fmt: skip
    for name, default, meaning in sizes:
        parser.add_argument(name, type=types.positive_int, default=default, help=meaning)
    for name, default, meaning in (("--tokens", 1048576, "N"), ("--ranks", 1, "devices that share the sequence")):
        several = f"{meaning}; several are compared with ring attention and Ulysses"
        parser.add_argument(name, type=types.positive_int, nargs="+", default=[default], metavar="N", help=several)
    parser.add_argument(
        "--block",
        type=types.positive_int,
        nargs=2,
        metavar=("ROWS", "KEYS"),
        default=None,
        help="of a mask block; default: the operator's",
    )
    parser.add_argument("--device", choices=sorted(DEVICES), default="h200", help="device of the data sheet")
    parser.add_argument(
        "--flops", type=types.positive_number, default=None, help="FLOP per second; default: the data sheet's"
    )
    parser.add_argument(
        "--bandwidth", type=types.positive_number, default=None, help="bytes per second of memory; default: likewise"
    )
    parser.add_argument(
        "--link",
        type=types.positive_number,
        default=None,
        help="bytes per second from other devices of its node; default: likewise",
    )
    parser.add_argument(
        "--network",
        type=types.positive_number,
        default=None,
        help="bytes per second from other nodes; default: likewise",
    )
    parser.add_argument(
        "--latency", type=types.positive_number, default=None, help=f"seconds per message (default: {LATENCY})"
    )
    parser.add_argument("--achieved", type=types.fraction, default=1.0, help="achieved share of these rates, in (0, 1]")
    parser.add_argument(
        "--rho",
        type=types.bounded(float, least=1),
        default=1.2,
        help="pairs in visited blocks over pairs that the mask shows; depends on the gates, see docs/benchmarks.md",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--markdown",
        type=types.input_file,
        default=None,
        help="a page in which to replace the tables of the comparison",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or those of the comparison."""
    with refusing(ValueError):
        if len(arguments.tokens) * len(arguments.ranks) > 1:
            return _compare(arguments)
        for name in ("network", "latency", "markdown"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name}: expected several --tokens or --ranks with it, got one of each")
        (tokens,), (ranks,) = arguments.tokens, arguments.ranks
        device, sizes = _device(arguments), _sizes(arguments) | {"N": tokens, "ranks": ranks}
        rows = _costs(device, sizes, arguments.achieved)
    if arguments.json:
        print(json.dumps({"device": vars(device), "calls": rows}, indent=2))
        return 0
    print(
        f"{device.name}: {device.flops / 1e12:,.0f} TFLOP/s, memory {device.bandwidth / 1e12:,.2f} TB/s, link "
        f"{device.link / 1e9:,.0f} GB/s ({device.source}), of which {arguments.achieved:.0%} are achieved\n"
        f"B={sizes['B']} N={tokens:,} w={sizes['w']:,} Hq={sizes['Hq']} Hkv={sizes['Hkv']} D={sizes['D']}, "
        f"blocks of {sizes['rows']} x {sizes['columns']}, rho={arguments.rho}\n"
    )
    width = max(map(len, rows))
    print(" " * width, *(f"{head:>13}" for head, _, _ in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[field] / unit:13,.3f}" for _, field, unit in COLUMNS))
    held = max(row["peak"] for row in rows.values())
    if held > device.memory:
        print(f"\nthe peak does not fit into {device.memory / 1e9:,.0f} GB")
    print(f"\n{LEAST}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """Print the tables of several sizes, and put them into a page."""
    links = Links(_device(arguments), arguments.latency or LATENCY, arguments.achieved)
    sizes = _sizes(arguments)
    cases = list(compared(links, sizes, arguments.tokens, arguments.ranks))
    scan = list(scans(links, sizes, arguments.ranks))
    if arguments.json:
        rows = [
            case._asdict() | {w: way and way._asdict() for w, way in zip(WAYS, case[2:], strict=True)} for case in cases
        ]
        print(json.dumps({"device": vars(links.device), "cases": rows, "scans": [s._asdict() for s in scan]}, indent=2))
        return 0
    text = markdown(cases, scan, links, sizes)
    print(text, LEAST, sep="\n")
    if arguments.markdown is not None:
        page = between(arguments.markdown.read_text(), "scaling", text)
        atomic_write(arguments.markdown, partial(Path.write_text, data=page))
    return 0


def _device(arguments: argparse.Namespace) -> Device:
    """The device, with the rates that are given."""
    given = {name: value for name in RATES if (value := getattr(arguments, name)) is not None}
    device = DEVICES[arguments.device]
    return replace(device, **given, source="as given" if given.keys() >= set(RATES[:3]) else device.source)


def _sizes(arguments: argparse.Namespace) -> dict[str, float]:
    """The sizes of the formulas, without N and ranks."""
    types.check_multiple(arguments, "query_heads", "kv_heads")
    for tokens, ranks in product(arguments.tokens, arguments.ranks):
        if tokens % ranks:
            raise ValueError(f"--ranks: expected a divisor of {tokens} tokens, got {ranks}")
    rows, columns = default_block_size("cuda") if arguments.block is None else arguments.block
    return {
        "B": arguments.batch, "w": arguments.window, "Hq": arguments.query_heads, "Hkv": arguments.kv_heads,
        "D": arguments.head_dim, "Dv": arguments.head_dim, "rows": rows, "columns": columns, "slots": arguments.window,
        "element": arguments.element, "gate_element": 4, "rho": arguments.rho,
    }  # fmt: skip


def _costs(device: Device, sizes: dict[str, float], achieved: float) -> dict[str, dict[str, float]]:
    """Cost and times of each call."""
    ranks = sizes["ranks"]
    if ranks == 1:
        calls: dict[str, Cost] = {"forward": forward(), "backward": backward(), "decode, one token": decode()}
        calls["full attention, forward"] = full_attention()
    else:
        calls = {
            f"one rank of {ranks}, forward": context_parallel(),
            f"one rank of {ranks}, forward + backward": context_parallel(training=True),
            f"one rank of {ranks}, full attention, forward": full_attention(),
        }
    costs = {name: call.at(**sizes) for name, call in calls.items()}
    return {name: cost | estimate(device, cost, achieved) for name, cost in costs.items()}
