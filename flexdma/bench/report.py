"""Results as JSON and as the Markdown of docs/benchmarks.md."""

import platform
from pathlib import Path
from typing import Any

import torch

from flexdma._version import __version__


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flexdma": __version__,
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    about = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value is not None)
    lines = [f"Measured with {about}; {results['dtype']}, B=1, medians of {results['rounds']} interleaved rounds.", ""]
    lines += ["| | " + results["heads"] + " | seconds | faster than SDPA |", "|---|---|---|---|"]
    for case in results["calls"]:
        base = next(iter(case["seconds"].values()))
        for name, seconds in case["seconds"].items():
            lines.append(f"| {case['shape']} | {name} | {seconds:.4f} | {base / seconds:.2f} x |")
    for case in results["stages"]:
        lines += [
            "",
            f"Stages of the {case['shape']}:",
            "",
            "| stage | milliseconds | of gather | of flex |",
            "|---|---|---|---|",
        ]
        whole = {name: case["seconds"][f"{name}, whole"] for name in ("gather", "flex")}
        parts = {
            "gather": ("selection", "reference gates", "living keys"),
            "flex": ("selection", "reference gates", "packing", "block mask"),
        }
        for name, seconds in case["seconds"].items():
            shares = [f"{seconds / whole[w]:.1%}" if name in parts[w] else "" for w in whole]
            lines.append(f"| {name} | {seconds * 1e3:.1f} | {shares[0]} | {shares[1]} |")
        sums = [f"{sum(case['seconds'][part] for part in parts[w]) / whole[w]:.1%}" for w in whole]
        lines.append(f"| all but attention | | {sums[0]} | {sums[1]} |")
    for case in results["packing"]:
        lines += ["", f"Visited blocks / ideal, N={case['length']} w={case['window']}, {case['tile']}:", ""]
        lines += ["| gates | natural order | packed |", "|---|---|---|"]
        lines += [f"| {name} | {natural:.2f} | {packed:.2f} |" for name, (natural, packed) in case["ratios"].items()]
        means = [sum(r[n] for r in case["ratios"].values()) / len(case["ratios"]) for n in (0, 1)]
        lines.append(f"| **mean** | {means[0]:.2f} | **{means[1]:.2f}** |")
    lines += [
        "",
        "Peak memory of building masks and metadata:",
        "",
        "| | lowering | peak | a Q x K mask of bytes |",
        "|---|---|---|---|",
    ]
    for case in results["memory"]:
        lines.append(
            f"| {case['shape']} | {case['lowering']} | {case['bytes'] / 2**20:.1f} MiB | {case['dense'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"
