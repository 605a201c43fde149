"""`python -m flexdma inspect`: the kernels of the operator for given settings, or the differences between two settings."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexdma.atomic_write import atomic_write
from flexdma.attention import dynamic_mask_attention
from flexdma.checks import LOWERINGS, SELECTIONS_BY_GATE
from flexdma.tools import arguments as types
from flexdma.tools.inspect import grid
from flexdma.tools.inspect.call import FIGURES, inspect_kernels
from flexdma.tools.inspect.report import KernelReport
from flexdma.tools.inspect.targets import TARGETS
from flexdma.tools.machine import triton_version
from flexdma.tools.refusal import RefusedError, check_installed, refusing

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
# name -> (type or choices, default, help).  Every setting is an option and a key of --diff.
SETTINGS: dict[str, tuple[Any, Any, str]] = {
    "batch": (types.positive_int, 1, "B"),
    "heads": (types.positive_int, 8, "query heads"),
    "kv_heads": (types.positive_int, 2, "key and value heads"),
    "queries": (types.natural, 0, "Q; 0 = as many as keys"),
    "keys": (types.positive_int, 4096, "K"),
    "head_dim": (types.positive_int, 64, "D"),
    "window": (types.positive_int, 512, "w, the keys that a query sees"),
    "selection": (SELECTIONS_BY_GATE, "causal", "how keys are selected"),
    "dtype": (tuple(DTYPES), None, "of query, key and value; default: bfloat16 for a GPU, float32 for a CPU"),
    "gate_dtype": (tuple(DTYPES), "float32", "of the gate"),
    "lowering": (LOWERINGS, None, "default: the operator's choice"),
    "block_size": (types.natural, 0, "of the mask; 0 = the lowering's default"),
    "training": (("yes", "no"), "yes", "yes: forward and backward; no: the forward of inference"),
    "target": (tuple(TARGETS), None, "compile for this GPU, also without having one; default: this machine's device"),
    "figures": (FIGURES, "attention", "kernels to compile for registers, spills, occupancy"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    for name, (kind, default, text) in SETTINGS.items():
        choice: dict[str, Any] = {"choices" if isinstance(kind, tuple) else "type": kind}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **choice)
    parser.add_argument(
        "--kernel-option",
        type=_kernel_option,
        action="append",
        default=[],
        metavar="NAME=INT",
        help="option of FlexAttention, e.g. num_warps=8",
    )
    parser.add_argument(
        "--diff",
        type=_change,
        nargs="+",
        metavar="KEY=VALUE",
        help="compare with these settings changed, e.g. --diff window=256",
    )
    parser.add_argument("--save", type=types.output_folder, metavar="DIR", help="folder for sources and report.json")
    text = "compile the grid of tiles, warps and stages for these settings, and add its figures to this JSON"
    parser.add_argument("--grid", type=types.output_file, metavar="FILE", help=text)
    parser.add_argument("--source", action="store_true", help="also print the attention kernels, or their diff")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report or the difference."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    options = dict(arguments.kernel_option)
    if arguments.grid:
        return _grid(settings, arguments.grid)
    with refusing(ValueError, TypeError, ImportError, RuntimeError):
        report, other = _report(settings, options), None
        if arguments.diff is not None:
            changes = dict(arguments.diff)
            changed = {name: changes.pop(name, value) for name, value in settings.items()}
            other = _report(changed, changes or options)
    if arguments.save:
        (report if other is None else other).save(arguments.save)
    if other is None:
        print(report.to_json() if arguments.json else report)
        if arguments.source:
            print("\n".join(f"\n# {kernel.name}\n{kernel.source}" for kernel in report.attention))
        return 0
    difference = report.diff(other)
    print(json.dumps(difference.changes(), indent=2) if arguments.json else difference)
    if arguments.source:
        print(difference.source())
    return 0


def _grid(settings: dict[str, Any], path: Path) -> int:
    """Compile what the file does not have, save after each compilation, and print the tables."""
    if settings["target"] is None or settings["target"] not in TARGETS or TARGETS[settings["target"]].gfx:
        raise RefusedError(f"--grid: expected --target with an NVIDIA GPU, got {settings['target']}")
    check_installed("rich", extra="bench")
    from flexdma.tools.progress import progress_bars

    settings = settings | {"training": "yes", "figures": "attention"}
    dtype = settings["dtype"] or "bfloat16"
    about = {"target": settings["target"], "torch": torch.__version__, "triton": triton_version()}
    with refusing(ValueError, TypeError, ImportError, RuntimeError, OSError):
        found, records = grid.from_json(path.read_text()) if path.exists() else (about, [])
        if found != about:
            raise ValueError(f"--grid: expected a file for {about}, {path} is for {found}")
        total = len(list(grid.pairs(dtype, settings["head_dim"])))
        with progress_bars(transient=True) as bars:
            task = bars.add_task(f"{dtype}, D={settings['head_dim']}", total=total, note="")
            for new in grid.compiled_pairs(
                dtype, settings["head_dim"], records, lambda options: _report(settings, options)
            ):
                records += new
                bars.update(task, advance=1)
                atomic_write(path, partial(Path.write_text, data=grid.to_json(about, records)))
    print("\n\n".join(f"{phase}:\n\n{grid.table(records, phase)}" for phase in grid.PHASES))
    return 0


def _kernel_option(text: str) -> tuple[str, int]:
    name, value = types.pair(text)
    return name, types.natural(value)


def _change(text: str) -> tuple[str, Any]:
    """A change of a setting, or of a kernel option if the name is no setting."""
    name, value = types.pair(text)
    if (setting := name.replace("-", "_")) not in SETTINGS:
        return _kernel_option(text)
    kind = SETTINGS[setting][0]
    try:
        return setting, (types.one_of(kind) if isinstance(kind, tuple) else kind)(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{setting}: {error}") from error


def _report(settings: dict[str, Any], options: dict[str, int]) -> KernelReport:
    target, training = settings["target"], settings["training"] == "yes"
    device = "cuda" if target is None and torch.cuda.is_available() else "cpu"
    default = "bfloat16" if target or device == "cuda" else "float32"
    dtype, gate_dtype = DTYPES[settings["dtype"] or default], DTYPES[settings["gate_dtype"]]
    batch, keys, size = settings["batch"], settings["keys"], settings["head_dim"]

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=training)

    query = tensor(batch, settings["heads"], settings["queries"] or keys, size, dtype=dtype)
    key, value = (tensor(batch, settings["kv_heads"], keys, size, dtype=dtype) for _ in range(2))
    gate = tensor(batch, settings["kv_heads"], keys, dtype=gate_dtype)
    with torch.set_grad_enabled(training):
        return inspect_kernels(
            dynamic_mask_attention,
            query,
            key,
            value,
            gate,
            target=target,
            figures=settings["figures"],
            window_size=settings["window"],
            selection=settings["selection"],
            lowering=settings["lowering"],
            block_size=settings["block_size"] or None,
            kernel_options=options or None,
        )
