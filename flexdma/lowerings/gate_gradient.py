"""The gate's gradient, d gate_j = sum_i dS_ij: three exact routes, none of them a kernel of our own.

"atomics"     FlexAttention's: every element of every visited tile is added to the gate's gradient in memory, atomically, in
              float32.  The default.
"transposed"  d gate_j = dV_j . v_j - sum_i P_ij D_i,  D_i = dO_i . o_i, since dS_ij = P_ij (dO_i . v_j - D_i).  The sum is
              one more FlexAttention forward, keys as queries, D as values, on the transposed mask.  Deterministic,
              and what `torch.use_deterministic_algorithms` and dynamic shapes take.
"column"      query' = [query, 1], key' = [key, 0]: the logits are the same, and the gradient of the 0 is the gate's.  Widens
              the head, which kernels round up to a power of two.  Deterministic; without a score_mod only.

Figures, and why the default is the default: docs/gate-gradient.md.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from flexdma import checks
from flexdma.opaque import realize
from flexdma.packing.block_index import BlockIndex
from flexdma.signatures import MaskMod, ScoreMod

ROUTES = ("atomics", "transposed", "column")
# Read while a call is traced; torch.compile guards on it.
_route = "atomics"

# A value head of the transposed pass: the smallest that a tensor core takes.
COLUMNS = 16
# (keys, rows) and warps of its tiles, in 16 bits: docs/gate-gradient.md.  Inductor's own for float32.
TILE, WARPS = (128, 64), 8


@contextlib.contextmanager
def gate_gradient_route(route: str) -> Iterator[None]:
    """While active, calls of the flex lowering take the gate's gradient by this route (one of ROUTES); for benchmarks.

    Under `torch.use_deterministic_algorithms(True)` "atomics" is "transposed" nevertheless.
    """
    global _route
    checks.one_of("route", route, ROUTES)
    before, _route = _route, route
    try:
        yield
    finally:
        _route = before


def chosen_route(needed: bool, has_score_mod: bool, sizes: Sequence[int] = ()) -> str:
    """The route of a call made now; "atomics", which is plain FlexAttention, where the gate needs no gradient.

    A score_mod would scale the gradient of "column", which then is "transposed".  So is "atomics" where one of the
    call's `sizes` is not known while compiling: Inductor then fails on the gradient of a captured tensor (torch 2.11, 2.13).
    """
    if not needed:
        return "atomics"
    atomics_cannot = torch.are_deterministic_algorithms_enabled() or not all(map(has_static_value, sizes))
    if (_route == "atomics" and atomics_cannot) or (_route == "column" and has_score_mod):
        return "transposed"
    return _route


def attend(
    route: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    score_mod: ScoreMod,
    block_mask: BlockMask,
    scale: float,
    kernel_options: Any,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`flex_attention` with a score_mod that adds `gate`, whose gradient is taken by `route`.

    query: [B, H, R, D]; key, value: [B, H, K, D]; gate: [B, H, K] float32.
    score_mod: reads `gate`, with "atomics" itself, else its values without a gradient.
    block_mask: with its transposed half, unless the route is "atomics".
    Returns the output and, with return_lse, the log-sum-exp of the scores [B, H, R], which has gradients as well.
    """
    if route == "column":
        query, key = _with_gate_column(query, key, gate, scale)
    if route != "transposed" and not return_lse:
        output = flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=kernel_options
        )
        return output, None

    if route == "transposed":
        value = _FromValue.apply(value, gate)
    output, aux = flex_attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=kernel_options,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    returned = [cast(Tensor, aux.lse)] if return_lse else []
    if route != "transposed":
        return output, returned[0]
    lse = cast(Tensor, aux.lse).detach()
    lse = realize(torch.where(lse == float("-inf"), 0.0, lse))  # of a row that sees nothing
    rows, keys, transposed = query.detach(), key.detach(), transposed_block_mask(block_mask)

    def log_weight(score: Tensor, b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return score_mod(score, b, h, row, column) - lse[b, h, row]

    def weighted_sum(numbers: Tensor) -> Tensor:
        """sum_i P_ij numbers_i: [B, H, R] -> [B, H, K]."""
        columns, unit = as_values(numbers, keys.dtype)
        mean, total = flex_attention(
            keys, rows, columns, score_mod=log_weight, block_mask=transposed, scale=scale,
            kernel_options=_transposed_options(kernel_options, block_mask.BLOCK_SIZE, keys.dtype),
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return wide(mean[..., :2]).sum(-1) * cast(Tensor, total.lse).exp() * unit

    output, *returned = _FromOutput.apply(gate, weighted_sum, output, *returned)
    return output, returned[0] if returned else None


def transposed_block_mask(block_mask: BlockMask) -> BlockMask:
    """The mask with keys as queries, forward alone."""
    mask_mod: MaskMod = block_mask.mask_mod

    def transposed_mask_mod(b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return mask_mod(b, h, row, column)

    rows, columns = block_mask.BLOCK_SIZE
    by_key = [block_mask.q_num_blocks, block_mask.q_indices, block_mask.full_q_num_blocks, block_mask.full_q_indices]
    return BlockIndex.of(cast(list[Tensor], by_key)).block_mask(
        block_mask.seq_lengths[::-1], (columns, rows), transposed_mask_mod
    )


def as_values(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """[B, H, R] -> [B, H, R, COLUMNS] of this dtype, and a unit: the first two columns times the unit add up to it."""
    unit: Tensor | float = 1.0
    if dtype == torch.float16:  # whose range they may leave
        unit = numbers.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        numbers = numbers / unit
    high = numbers.to(dtype)
    column = torch.arange(COLUMNS, device=numbers.device)
    values = torch.where(column == 0, high[..., None], 0.0)
    if dtype.itemsize == 2:
        values = torch.where(column == 1, (numbers - high).to(dtype)[..., None], values)
    return values, unit


def _transposed_options(options: dict | None, block_size: tuple[int, int], dtype: torch.dtype) -> Any:
    """The caller's kernel options with the tile turned over, without what is the forward's alone; else TILE."""
    given = {name: option for name, option in (options or {}).items() if not name.startswith("fwd_")}
    rows, columns = block_size
    tile = {"BLOCK_M": given.pop("BLOCK_N", None), "BLOCK_N": given.pop("BLOCK_M", None)}
    if not any(tile.values()) and dtype.itemsize == 2:
        tile = {"BLOCK_M": gcd(TILE[0], columns), "BLOCK_N": gcd(TILE[1], rows)}
        given.setdefault("num_warps", WARPS)
    given |= {name: size for name, size in tile.items() if size is not None}
    # The kernel for short queries, of which there are none here, has tiles of its own.
    return given | {"FORCE_USE_FLEX_ATTENTION": True}


def _with_gate_column(query: Tensor, key: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One more column, 1 in the query and 0 in the key; seven more of zeros keep rows aligned to 16 bytes."""
    one = torch.ones_like(query[..., :1])
    zero = _Zero.apply(gate, key.dtype, scale)[..., None]
    return pad(torch.cat([query, one], -1), (0, 7)), pad(torch.cat([key, zero], -1), (0, 7))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _FromValue(torch.autograd.Function):
    """The values as they are; their gradient gives the gates dV_j . v_j."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (value,) = ctx.saved_tensors
        return gradient, (wide(gradient) * wide(value)).sum(-1)


class _FromOutput(torch.autograd.Function):
    """The output as it is, and the log-sum-exp if given; their gradients give the gates - sum_i P_ij (D_i - dL_i)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, weighted_sum: Callable[[Tensor], Tensor], output: Tensor, *lse: Tensor) -> Any:
        ctx.save_for_backward(output)
        ctx.weighted_sum = weighted_sum
        return tuple(tensor.view_as(tensor) for tensor in (output, *lse))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *lse_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        numbers = (wide(gradient) * wide(output)).sum(-1)
        for each in lse_gradient:
            numbers = numbers - each
        return -ctx.weighted_sum(numbers), None, gradient, *lse_gradient


class _Zero(torch.autograd.Function):
    """Zeros of the gate's shape, through which it has a gradient; logits hold them times `scale`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.scale = scale
        return torch.zeros_like(gate, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return wide(gradient) / ctx.scale, None, None
