"""`python -m flexdma explain`: what gates of a family, or saved gates, select and cost."""

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor

from flexdma.checks import SELECTIONS_BY_GATE
from flexdma.tools import arguments as types
from flexdma.tools.explain.call import explain
from flexdma.tools.gate_families import gate_families
from flexdma.tools.refusal import refusing

FAMILIES = [name.replace(" ", "-") for name in gate_families(1)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--length", type=types.positive_int, default=32768, help="N")
    parser.add_argument("--window", type=types.positive_int, default=1024, help="w, the keys that a query sees")
    parser.add_argument(
        "--gates", default="iid", help=f"{', '.join(FAMILIES)}, constant; or a file of torch.save with [B, Hkv, K]"
    )
    parser.add_argument("--kv-heads", type=types.positive_int, default=2, help="heads of the gates")
    parser.add_argument("--query-heads", type=types.positive_int, default=8, help="query heads")
    parser.add_argument("--selection", choices=SELECTIONS_BY_GATE, default="causal", help="how keys are selected")
    parser.add_argument("--sinks", type=types.natural, default=0, help="first keys that stay visible")
    parser.add_argument("--recent", type=types.natural, default=0, help="last keys that are always visible")
    parser.add_argument(
        "--document", type=types.natural, default=0, help="length of packed documents; 0 = one document"
    )
    parser.add_argument("--block-size", type=types.natural, default=0, help="of the mask; 0 = the lowering's default")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure the cost model's rates on this machine, for a minute or two",
    )
    parser.add_argument(
        "--fit",
        type=types.bench_results,
        default=None,
        help="only print the rates that fit a bench-SUITE.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    with refusing(ValueError, TypeError, OSError):
        if arguments.fit is not None:
            from flexdma.tools.explain.calibration import fitted_rates

            for phase, fitted in fitted_rates(arguments.fit).items():
                print(f"{phase}: {fitted}")
            return 0
        gate = _gates(arguments)
        documents = None
        if arguments.document:
            positions = torch.arange(gate.shape[-1]).expand(gate.shape[0], -1)
            documents = positions // arguments.document
        rates = None
        if arguments.calibrate:
            from flexdma.tools.explain.calibration import measured_rates

            device = "cuda" if torch.cuda.is_available() else "cpu"
            rates, gate = measured_rates(device), gate.to(device)
            documents = None if documents is None else documents.to(device)
        report = explain(
            gate,
            arguments.window,
            num_query_heads=arguments.query_heads,
            selection=arguments.selection,
            sinks=arguments.sinks,
            recent=arguments.recent,
            document_ids=documents,
            block_size=arguments.block_size or None,
            rates=rates,
        )
    print(report.to_json() if arguments.json else report)
    return 0


def _gates(arguments: argparse.Namespace) -> Tensor:
    length, heads = arguments.length, arguments.kv_heads
    if arguments.gates == "constant":
        return torch.zeros(1, heads, length)
    if arguments.gates in FAMILIES:
        name = arguments.gates.replace("-", " ")
        return torch.stack([gate_families(length, seed)[name] for seed in range(1, heads + 1)])[None]
    path = Path(arguments.gates)
    if not path.is_file():
        raise ValueError(f"--gates: expected a file or one of {', '.join(FAMILIES)}, constant; got {arguments.gates!r}")
    try:
        gate = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"--gates: expected a tensor that torch.save wrote, got {path}") from error
    if not isinstance(gate, Tensor):
        raise TypeError(f"--gates: expected a tensor [B, Hkv, K] in {path}, got {type(gate).__name__}")
    return gate
