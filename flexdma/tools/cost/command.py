"""`python -m flexdma cost`: the cost of a size on one or more devices, at the rates of their data sheet."""

import argparse
import json
from dataclasses import replace
from typing import Any

from flexdma.lowerings.default_options import default_block_size
from flexdma.tools import arguments as types
from flexdma.tools.cost import DEVICES, Cost, backward, context_parallel, decode, estimate, forward, full_attention
from flexdma.tools.refusal import refusing

COLUMNS = (
    ("TFLOP", "flops", 1e12), ("moved, GB", "bytes", 1e9), ("metadata, MB", "metadata", 1e6), ("peak, MB", "peak", 1e6),
    ("received, MB", "received", 1e6), ("computing, ms", "computing", 1e-3), ("memory, ms", "memory", 1e-3),
    ("link, ms", "link", 1e-3), ("at least, ms", "least", 1e-3),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sizes = (
        ("--batch", 1, "B"), ("--tokens", 1048576, "N"), ("--window", 1024, "w, the keys that a query sees"),
        ("--query-heads", 16, "Hq"), ("--kv-heads", 4, "Hkv"), ("--head-dim", 128, "D and Dv"),
        ("--ranks", 1, "devices that share the sequence"),
        ("--element", 2, "bytes per number of query, key, value and output"),
    )  # fmt: skip
    for name, default, meaning in sizes:
        parser.add_argument(name, type=types.positive_int, default=default, help=meaning)
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
        help="bytes per second from other devices; default: likewise",
    )
    parser.add_argument("--achieved", type=types.fraction, default=1.0, help="achieved share of these rates, in (0, 1]")
    parser.add_argument(
        "--rho",
        type=types.bounded(float, least=1),
        default=1.2,
        help="pairs in visited blocks over pairs that the mask shows; depends on the gates, see docs/benchmarks.md",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    with refusing(ValueError):
        device, rows = _costs(arguments)
    if arguments.json:
        print(json.dumps({"device": vars(device), "calls": rows}, indent=2))
        return 0
    block = " x ".join(map(str, _block(arguments)))
    print(
        f"{device.name}: {device.flops / 1e12:,.0f} TFLOP/s, memory {device.bandwidth / 1e12:,.2f} TB/s, link "
        f"{device.link / 1e9:,.0f} GB/s ({device.source}), of which {arguments.achieved:.0%} are achieved\n"
        f"B={arguments.batch} N={arguments.tokens:,} w={arguments.window:,} Hq={arguments.query_heads} "
        f"Hkv={arguments.kv_heads} D={arguments.head_dim}, blocks of {block}, rho={arguments.rho}\n"
    )
    width = max(map(len, rows))
    print(" " * width, *(f"{head:>13}" for head, _, _ in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[field] / unit:13,.3f}" for _, field, unit in COLUMNS))
    held = max(row["peak"] for row in rows.values())
    if held > device.memory:
        print(f"\nthe peak does not fit into {device.memory / 1e9:,.0f} GB")
    print("\nLeast times, not predictions: every kernel at these rates, without launches and waiting.")
    return 0


def _block(arguments: argparse.Namespace) -> tuple[int, int]:
    """(rows, keys) of a mask block: the given ones, or the operator's."""
    return default_block_size("cuda") if arguments.block is None else tuple(arguments.block)


def _costs(arguments: argparse.Namespace) -> tuple[Any, dict[str, dict[str, float]]]:
    """The device, and for each call its cost and times."""
    types.check_multiple(arguments, "query_heads", "kv_heads")
    if arguments.tokens % arguments.ranks:
        raise ValueError(f"--ranks: expected a divisor of {arguments.tokens} tokens, got {arguments.ranks}")
    given = {name: value for name in ("flops", "bandwidth", "link") if (value := getattr(arguments, name)) is not None}
    device = DEVICES[arguments.device]
    device = replace(device, **given, source="as given" if len(given) == 3 else device.source) if given else device
    rows, columns = _block(arguments)
    sizes = {
        "B": arguments.batch, "N": arguments.tokens, "w": arguments.window, "Hq": arguments.query_heads,
        "Hkv": arguments.kv_heads, "D": arguments.head_dim, "Dv": arguments.head_dim, "rows": rows,
        "columns": columns, "ranks": arguments.ranks, "slots": arguments.window, "element": arguments.element,
        "gate_element": 4, "rho": arguments.rho,
    }  # fmt: skip
    if arguments.ranks == 1:
        calls: dict[str, Cost] = {"forward": forward(), "backward": backward(), "decode, one token": decode()}
        calls["full attention, forward"] = full_attention()
    else:
        calls = {
            f"one rank of {arguments.ranks}, forward": context_parallel(),
            f"one rank of {arguments.ranks}, forward + backward": context_parallel(training=True),
            f"one rank of {arguments.ranks}, full attention, forward": full_attention(),
        }
    costs = {name: call.at(**sizes) for name, call in calls.items()}
    return device, {name: cost | estimate(device, cost, arguments.achieved) for name, cost in costs.items()}
