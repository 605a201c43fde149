"""`python -m flexdma tune`: measure tiles, warps and stages on this machine, and keep the fastest for later calls."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from flexdma.lowerings.tuned import PHASES, Key, Winner, key_of
from flexdma.tools import arguments as types
from flexdma.tools.refusal import RefusedError, check_installed, refusing
from flexdma.tools.shapes import Shape
from flexdma.tools.timing import LostDeviceError
from flexdma.tools.tune import store
from flexdma.tools.tune.candidates import Candidate, candidates
from flexdma.tools.tune.measure import Timing, search, timer_of, without_winners


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, number = parser.add_argument, types.positive_int
    add("--device", type=types.device("cpu", "cuda"), default=None, help="cuda or cpu; default: cuda")
    add("--dtype", choices=tuple(types.DTYPES), default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--head-dim", type=number, nargs="+", default=[64, 128], metavar="D", help="head sizes to tune")
    add("--heads", type=number, default=16, help="query heads")
    add("--kv-heads", type=number, default=4, help="key and value heads; winners hold for heads / kv-heads")
    add("--length", type=number, default=16384, help="N, of the measured calls")
    add("--window", type=number, default=1024, help="w, of the measured calls")
    phases = "default: both on a GPU, inference on a CPU, where FlexAttention has no backward"
    add("--phase", choices=PHASES, default=None, help=phases)
    add("--rounds", type=number, default=5, help="runs of each candidate, in turns with the default")
    add("--candidates", type=number, default=None, help="measure only so many of each phase; default: all")
    add("--list", action="store_true", help="print the winners of the file and measure nothing")
    add("--forget", action="store_true", help="remove the file and measure nothing")


def run(arguments: argparse.Namespace) -> int:
    """Measure, or print or remove what was kept."""
    path = store.file_of_winners()
    if arguments.forget:
        path.unlink(missing_ok=True)
        print(f"removed {path}")
        return 0
    if arguments.list:
        print("\n".join([f"{path}:", *map(described, store.winners_in(path))]))
        return 0
    types.check_multiple(arguments, "heads", "kv_heads")
    check_installed("rich", extra="bench")
    if arguments.device is None and not torch.cuda.is_available():
        raise RefusedError(
            "--device: expected a CUDA device, found none; --device cpu tunes the C++ kernel of this CPU"
        )
    device = arguments.device or "cuda"
    if device == "cpu" and arguments.phase == "training":
        raise RefusedError("--phase: expected inference with --device cpu, where FlexAttention has no backward")
    phases = (arguments.phase,) if arguments.phase else PHASES[: 1 if device == "cpu" else 2]
    store.winners_in(path)  # refuse a file that cannot be read before measuring for minutes
    with refusing(ValueError, OSError):
        for size in arguments.head_dim:
            forward: Mapping[str, int] = {}
            for phase in phases:
                best = _tuned(arguments, path, device, size, phase, forward)
                forward = {} if best is None else best.kernel_options
    return 0


def described(winner: Winner) -> str:
    """One line for a winner."""
    key = winner.key
    rows, keys = winner.block_size
    options = ", ".join(f"{name}={size}" for name, size in winner.kernel_options.items())
    triton = f", triton {key.triton}" if key.triton else ""
    return (
        f"{key.device}, {key.dtype}, D={key.head_dim}, G={key.group}, {key.phase} (torch {key.torch}{triton}): "
        f"{winner.seconds / winner.default_seconds:.3f} of the default's {1e3 * winner.default_seconds:.3f} ms, "
        f"blocks of {rows}x{keys}{', ' if options else ''}{options}"
    )


def _tuned(
    arguments: argparse.Namespace, path: Path, device: str, size: int, phase: str, forward: Mapping[str, int]
) -> Winner | None:
    """Measure one head size and phase, with a progress bar, and print the result."""
    from flexdma.tools.progress import progress_bars

    dtype = types.DTYPES[arguments.dtype or ("float32" if device == "cpu" else "bfloat16")]
    trains = phase == "training"
    heads = (arguments.heads, arguments.kv_heads)
    shape = Shape(arguments.length, arguments.window, trains, *heads, size)
    key = key_of(torch.device(device), dtype, size, shape.group, trains=trains)
    chosen = candidates(torch.device(device).type, size, dtype, phase, forward)[: arguments.candidates]
    timer = timer_of(shape, device, dtype, arguments.rounds)
    with progress_bars(transient=True) as bars, without_winners():
        task = bars.add_task(f"D={size}, {phase}", total=len(chosen), note=chosen[0].name)

        def report(candidate: Candidate, timing: Timing) -> None:
            note = timing.failed or f"{candidate.name}: {timing.share:.3f} of the default"
            bars.update(task, advance=1, note=note)

        try:
            best = search(key, chosen, timer, partial(store.keep, path), report)
        except LostDeviceError as error:
            raise RefusedError(
                f"the GPU failed in {error.args[0]} ({error.args[1]}); earlier winners are kept"
            ) from error
    return _finished(path, key, best)


def _finished(path: Path, key: Key, best: Winner | None) -> Winner | None:
    if best is None:
        store.drop(path, key)
        print(
            f"{key.device}, {key.dtype}, D={key.head_dim}, G={key.group}, {key.phase}: no candidate beats the default"
        )
        return None
    print(described(best))
    return best
