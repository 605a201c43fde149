"""FlexAttention's kernel options for a call: the caller's; else those tuned on this device; else those of this file.

Inductor chooses what is missing: tile sizes, warps and stages, by its own heuristics, or by measuring in
`mode="max-autotune"`, where this file leaves it the choice.  On sm_90 some of its choices spill registers or were measured
slower; PREFERRED replaces them (docs/kernels.md has the figures).
"""

from collections.abc import Mapping
from itertools import chain
from math import gcd
from operator import index
from typing import Any

import torch
from torch import Tensor

from flexdma.lowerings import tuned
from flexdma.lowerings.flash import flash_block_size, is_flash

Options = tuple[tuple[str, int], ...]


def forward_options(rows: int, keys: int, *, warps: int, stages: int) -> Options:
    """The tile, warps and stages of the forward."""
    tile = (("fwd_BLOCK_M", rows), ("fwd_BLOCK_N", keys))
    return (*tile, ("fwd_num_warps", warps), ("fwd_num_stages", stages))


def backward_options(rows: int, keys: int, *, warps: int, stages: int) -> Options:
    """The tile in which dK and dV are summed; the one of dQ has rows and keys exchanged."""
    tile = (("bwd_BLOCK_M1", rows), ("bwd_BLOCK_N1", keys), ("bwd_BLOCK_M2", keys), ("bwd_BLOCK_N2", rows))
    return (*tile, ("bwd_num_warps", warps), ("bwd_num_stages", stages))


# Compute capability -> (bytes of a number, smallest and largest head size) -> what they take.
Rules = dict[tuple[int, int], dict[tuple[int, int, int], Any]]
# Options in place of Inductor's own.
PREFERRED: Rules = {
    (9, 0): {
        (2, 64, 64): forward_options(128, 128, warps=8, stages=3),
        (2, 65, 128): forward_options(64, 64, warps=4, stages=2),
        (2, 129, 256): backward_options(32, 32, warps=8, stages=2),
        (4, 64, 64): forward_options(64, 32, warps=8, stages=3) + backward_options(16, 16, warps=4, stages=2),
        (4, 128, 128): forward_options(32, 64, warps=8, stages=2) + backward_options(16, 16, warps=8, stages=2),
        (4, 256, 256): forward_options(16, 32, warps=8, stages=2) + backward_options(16, 16, warps=8, stages=2),
    },
}
# Options instead of those where nothing but a float32 number per key is added to the logits: they leave no register for more.
PREFERRED_PLAIN: Rules = {(9, 0): {(2, 65, 128): forward_options(128, 32, warps=4, stages=3)}}
# (rows, keys) of a mask block in inference.  Blocks of fewer keys visit fewer pairs; a backward's tile needs 128.
INFERENCE_BLOCKS: Rules = {(9, 0): {(2, 65, 128): (128, 64)}}
# Of the transposed pass for the gate's gradient in 16-bit dtypes: (keys, rows) and warps; the fastest of five on an H200 at
# D = 128.  For float32 Inductor chooses.
TRANSPOSED_TILE, TRANSPOSED_WARPS = (64, 64), 4
# (rows, keys) of a mask block.  CUDA: multiples of FlexAttention's Triton tiles.  CPU: measured (docs/benchmarks.md).
BLOCK_SIZE = {"cuda": (128, 128), "cpu": (128, 32)}


def default_block_size(device_type: str) -> tuple[int, int]:
    """(rows, keys) of a mask block for block_size=None, without tuning."""
    return BLOCK_SIZE.get(device_type, BLOCK_SIZE["cuda"])


def default_blocks(
    query: Tensor, heads: int, needs_gradient: bool, kernel_options: Mapping[str, object] | None
) -> tuple[int, int]:
    """(rows, columns) of mask blocks where the caller gives none: tuned on this device, or the default.

    query: [B, Hq, Q, D]; heads: Hkv.
    """
    size = max(index(query.shape[-1]), 1)
    if is_flash(kernel_options):
        return flash_block_size(query.device, size, needs_gradient)
    has_tile = any(bare_name(option) in ("BLOCK_M", "BLOCK_N") for option in kernel_options or ())
    return block_size_of(query.device, query.dtype, size, index(query.shape[1] // heads), needs_gradient, has_tile)


# Dynamo calls the next two while tracing instead of tracing them, and their results are constants of the graph.
@torch.compiler.assume_constant_result
def block_size_of(
    device: torch.device, dtype: torch.dtype, head_dim: int, group: int, trains: bool, has_tile: bool = False
) -> tuple[int, int]:
    """(rows, keys) of a mask block for block_size=None.

    has_tile: the caller gives rows or keys of a tile.  Such calls on a GPU, and those that Inductor measures, take the block
    that every tile divides.
    """
    block = default_block_size(device.type)
    if device.type != "cpu" and (has_tile or autotunes()):
        return block
    best = tuned.winner(tuned.key_of(device, dtype, head_dim, group, trains=trains))
    if best is not None:
        return best.block_size
    if device.type == "cpu" or trains or torch.version.hip is not None:
        return block
    return next(iter(_matching(INFERENCE_BLOCKS, torch.cuda.get_device_capability(device), dtype, head_dim)), block)


@torch.compiler.assume_constant_result
def device_options(
    device: torch.device, dtype: torch.dtype, head_dim: int, group: int, trains: bool, plain: bool = False
) -> Options:
    """Tuned options, else those of `preferred`, as pairs; none for a CPU, and none where Inductor measures."""
    if device.type == "cpu" or autotunes():
        return ()
    best = tuned.winner(tuned.key_of(device, dtype, head_dim, group, trains=trains))
    if best is not None:
        return tuple(best.kernel_options.items())
    if torch.version.hip is not None:
        return ()
    return preferred(torch.cuda.get_device_capability(device), dtype, head_dim, plain)


def preferred(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, plain: bool = False) -> Options:
    """The options of PREFERRED, or if plain and there are some of PREFERRED_PLAIN; none where Inductor chooses."""
    found = _matching(PREFERRED_PLAIN, capability, dtype, head_dim) if plain else []
    return tuple(chain(*(found or _matching(PREFERRED, capability, dtype, head_dim))))


def _matching(rules: Rules, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> list[Any]:
    return [
        found
        for (itemsize, smallest, largest), found in rules.get(capability, {}).items()
        if itemsize == dtype.itemsize and smallest <= head_dim <= largest
    ]


@torch.compiler.assume_constant_result
def autotunes() -> bool:
    """Whether Inductor compiles this call with max_autotune, by the mode of torch.compile or by its configuration."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._inductor import config

    if config.max_autotune:
        return True
    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # not compiled by Dynamo
        return False
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return bool(getattr(backend, "config", {}).get("max_autotune"))


def with_defaults(
    given: Mapping[str, object] | None, defaults: Options, block_size: tuple[int, int]
) -> dict[str, object]:
    """The caller's options, and the defaults for those that are missing, with tiles that divide a mask block.

    A default `fwd_num_warps` yields to the caller's `num_warps` too.
    """
    options = dict(given or {})
    if is_flash(options):
        return options
    # Inductor would use its decoding kernel for fewer than 128 rows, which spills and, in float32, compiles for minutes.
    if "BACKEND" not in options:
        options.setdefault("FORCE_USE_FLEX_ATTENTION", True)
    for name, size in defaults:
        bare = bare_name(name)
        if name not in options and bare not in options:
            options[name] = _fitting(bare, size, block_size)
    return options


def bare_name(option: str) -> str:
    """The name of a kernel option without the prefix of a phase."""
    return option.removeprefix("fwd_").removeprefix("bwd_")


def transposed_options(
    given: Mapping[str, object] | None, block_size: tuple[int, int], dtype: torch.dtype, autotuned: bool
) -> dict[str, object]:
    """Options of the transposed pass: the caller's with M and N of the tile swapped and without `fwd_` and `bwd_` ones.

    TRANSPOSED_TILE if the caller gives no tile and Inductor does not measure.
    """
    options = {name: option for name, option in (given or {}).items() if not name.startswith(("fwd_", "bwd_"))}
    if is_flash(options):
        return options
    rows, columns = block_size
    tile = {"BLOCK_M": options.pop("BLOCK_N", None), "BLOCK_N": options.pop("BLOCK_M", None)}
    if not any(tile.values()) and dtype.itemsize == 2 and not autotuned:
        tile = {"BLOCK_M": gcd(TRANSPOSED_TILE[0], columns), "BLOCK_N": gcd(TRANSPOSED_TILE[1], rows)}
        options.setdefault("num_warps", TRANSPOSED_WARPS)
    options |= {name: size for name, size in tile.items() if size is not None}
    return with_defaults(options, (), block_size)


def _fitting(name: str, size: int, block_size: tuple[int, int]) -> int:
    """The largest tile size that divides both this one and a mask block; other options unchanged."""
    for prefix, length in zip(("BLOCK_M", "BLOCK_N"), block_size, strict=True):
        if name.startswith(prefix):
            return gcd(size, length)
    return size
