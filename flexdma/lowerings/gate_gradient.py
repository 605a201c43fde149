"""The gate's gradient, d gate_j = sum_i dS_ij, by one of three exact routes.  All of them use plain FlexAttention.

"transposed"  d gate_j = dV_j . (v_j - c) - sum_i P_ij D_i,  D_i = dO_i . (o_i - c), for any c, since
              dS_ij = P_ij dO_i . (v_j - o_i).  The sum is one more FlexAttention forward, keys as queries, D as values, on
              the transposed mask.  c is the mean value, so that both terms are small.  Deterministic.  The default.
"atomics"     FlexAttention's own: it adds every element of every visited tile to the gate's gradient in memory, atomically,
              in float32.  "transposed" replaces it under `torch.use_deterministic_algorithms` and with dynamic shapes.
"column"      query' = [query, 1], key' = [key, 0]: the logits are the same, and the gradient of the 0 is the gate's.  Widens
              the head, which kernels round up to a power of two.  Deterministic; only without a score_mod.

Figures and the reasons for the default: docs/gate-gradient.md.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from flexdma import checks
from flexdma.lowerings.default_options import Options, autotunes, transposed_options, with_defaults
from flexdma.opaque import realize
from flexdma.packing.block_index import BlockIndex
from flexdma.signatures import MaskMod, ScoreMod

ROUTES = ("transposed", "atomics", "column")
# Tracing reads it, and torch.compile guards on it.
_route = "transposed"

# Size of a value head in the transposed pass: the smallest for a tensor core.
COLUMNS = 16


@contextlib.contextmanager
def gate_gradient_route(route: str) -> Iterator[None]:
    """While active, the flex lowering computes the gate's gradient by this route, one of ROUTES.  For benchmarks.

    Under `torch.use_deterministic_algorithms(True)` "transposed" still replaces "atomics".
    """
    global _route
    checks.one_of("route", route, ROUTES)
    before, _route = _route, route
    try:
        yield
    finally:
        _route = before


def chosen_route(needed: bool, has_score_mod: bool, sizes: Sequence[int] = (), *, atomics: bool = True) -> str:
    """The route of a call made now; "atomics", which is plain FlexAttention, where the gate needs no gradient.

    "transposed" replaces "column" where there is a score_mod, which would scale that gradient.  It replaces "atomics" where
    one of `sizes` is symbolic: Inductor then fails on the gradient of a captured tensor (torch 2.11, 2.13), and where the
    backend has no `atomics`.
    """
    if not needed:
        return "atomics"
    deterministic = torch.are_deterministic_algorithms_enabled()
    atomics_cannot = not atomics or deterministic or not all(map(has_static_value, sizes))
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
    defaults: Options = (),
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`flex_attention` with a score_mod that adds `gate`; `route` computes the gradient of `gate`.

    query: [B, H, rows, D]; key: [B, H, L, D]; value: [B, H, L, Dv]; gate: [B, H, L] float32.
    score_mod: captures `gate` itself with "atomics", else a copy without a gradient.
    block_mask: with its transposed half, unless the route is "atomics".
    kernel_options, defaults: the caller's, and those for what is missing; see `default_options`.
    Returns the output and, with return_lse, the differentiable log-sum-exp of the scores [B, H, rows].
    """
    options: Any = kernel_options
    if query.device.type != "cpu":
        # The defaults are for D, and "column" widens it.
        defaults = () if route == "column" else defaults
        options = with_defaults(kernel_options, defaults, block_mask.BLOCK_SIZE)
    if route == "column":
        query, key = _with_gate_column(query, key, gate, scale)
    if route != "transposed" and not return_lse:
        output = flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=options
        )
        return output, None

    centre = None
    if route == "transposed":
        # A buffer: kernels that sum over each key or row would divide by the length again for every number.
        centre = realize(mean_value(value.detach()))
        value = _FromValue.apply(value, centre, gate)
    output, aux = flex_attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    returned = [cast(Tensor, aux.lse)] if return_lse else []
    if route != "transposed":
        return output, returned[0]
    lse = cast(Tensor, aux.lse).detach()
    lse = realize(torch.where(lse == float("-inf"), 0.0, lse))  # -inf: the row sees no key
    rows, keys, transposed_mask = query.detach(), key.detach(), transposed_block_mask(block_mask)
    transposed: Any = transposed_options(kernel_options, block_mask.BLOCK_SIZE, keys.dtype, autotunes())

    def log_weight(score: Tensor, b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return score_mod(score, b, h, row, column) - lse[b, h, row]

    def weighted_sum(numbers: Tensor) -> Tensor:
        """sum_i P_ij numbers_i: [B, H, rows] -> [B, H, L]."""
        columns, unit = as_values(numbers, keys.dtype)
        mean, total = flex_attention(
            keys, rows, columns, score_mod=log_weight, block_mask=transposed_mask, scale=scale,
            kernel_options=transposed, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return wide(mean[..., :2]).sum(-1) * cast(Tensor, total.lse).exp() * unit

    output, *returned = _FromOutput.apply(gate, centre, weighted_sum, output, *returned)
    return output, returned[0] if returned else None


def transposed_block_mask(block_mask: BlockMask) -> BlockMask:
    """The mask with keys as queries, without a backward."""
    mask_mod: MaskMod = block_mask.mask_mod

    def transposed_mask_mod(b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return mask_mod(b, h, row, column)

    rows, columns = block_mask.BLOCK_SIZE
    by_key = [block_mask.q_num_blocks, block_mask.q_indices, block_mask.full_q_num_blocks, block_mask.full_q_indices]
    return BlockIndex.of(cast(list[Tensor], by_key)).block_mask(
        block_mask.seq_lengths[::-1], (columns, rows), transposed_mask_mod
    )


def as_values(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """[B, H, rows] -> [B, H, rows, COLUMNS] of this dtype, and a unit: numbers = (column 0 + column 1) * unit."""
    unit: Tensor | float = 1.0
    if dtype == torch.float16:  # numbers may leave its range
        unit = numbers.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        numbers = numbers / unit
    high = numbers.to(dtype)
    column = torch.arange(COLUMNS, device=numbers.device)
    values = torch.where(column == 0, high[..., None], 0.0)
    if dtype.itemsize == 2:
        values = torch.where(column == 1, (numbers - high).to(dtype)[..., None], values)
    return values, unit


def _with_gate_column(query: Tensor, key: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add one column, 1 in the query and 0 in the key, and seven of zeros, which keep rows aligned to 16 bytes."""
    one = torch.ones_like(query[..., :1])
    zero = _Zero.apply(gate, key.dtype, scale)[..., None]
    return pad(torch.cat([query, one], -1), (0, 7)), pad(torch.cat([key, zero], -1), (0, 7))


def mean_value(value: Tensor) -> Tensor:
    """[B, H, L, Dv] -> [B, H, 1, Dv] in float32 or float64; numbers that are not finite count as 0."""
    return wide(value).nan_to_num(0.0, 0.0, 0.0).mean(2, keepdim=True)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _FromValue(torch.autograd.Function):
    """Returns the values unchanged.  Its backward adds dV_j . (v_j - c) to the gate's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, centre: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value, centre)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        value, centre = ctx.saved_tensors
        return gradient, None, (wide(gradient) * (wide(value) - centre)).sum(-1)


class _FromOutput(torch.autograd.Function):
    """Returns output and, if given, log-sum-exp unchanged.  Its backward gives the gate - sum_i P_ij (D_i - dL_i)."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, centre: Tensor, weighted_sum: Callable[[Tensor], Tensor], output: Tensor, *lse: Tensor
    ) -> Any:
        ctx.save_for_backward(output, centre)
        ctx.weighted_sum = weighted_sum
        return tuple(tensor.view_as(tensor) for tensor in (output, *lse))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *lse_gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, centre = ctx.saved_tensors
        numbers = (wide(gradient) * (wide(output) - centre)).sum(-1)
        for each in lse_gradient:
            numbers = numbers - each
        return -ctx.weighted_sum(numbers), None, None, gradient, *lse_gradient


class _Zero(torch.autograd.Function):
    """Returns zeros of the gate's shape.  The logits contain them times `scale`, so the gate's gradient is theirs / scale."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.scale = scale
        return torch.zeros_like(gate, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return wide(gradient) / ctx.scale, None, None
