"""Heads as FlexAttention takes them, keys at the places of a `Packing`, and sums of places back to keys."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from flexdma.packing import Packing, along_keys
from flexdma.rounding import ceil_div

# Largest bag of unused entries in `sum_of_pieces`.
TAIL = 64
# The smallest head of FlexAttention's Triton kernels.
SMALLEST_HEAD = 16


def wide_enough(tensor: Tensor) -> Tensor:
    """[..., D] with zeros up to D = 16 on a GPU; wider heads, and those on a CPU, as they are."""
    missing = SMALLEST_HEAD - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing > 0 and tensor.device.type != "cpu" else tensor


def at_places(tensor: Tensor, packing: Packing, *, needs_gradient: bool) -> Tensor:
    """Keys [B, H, K, ...] -> [B, H, L, ...].  Of several intervals the packing of keys or of terms; see `Packing.of_keys`."""
    if needs_gradient:
        return _AtPlaces.apply(tensor, packing.order, packing.pieces, packing.starts)
    return along_keys(tensor, packing.order.long())


class _AtPlaces(torch.autograd.Function):
    """Gather whose backward sums the gradients of a key's pieces.

    The backward of `gather` adds each element of dK and dV to zeros by an atomic operation.  Here each key sums its pieces in
    order, so the result is the same to the bit every time.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, order: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(pieces, starts)
        return along_keys(tensor, order.long())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_of_pieces(gradient, *ctx.saved_tensors), None, None, None


def sum_of_pieces(tensor: Tensor, pieces: Tensor, starts: Tensor) -> Tensor:
    """[B, H, L, ...] at places -> [B, H, K, ...]: the sum over the pieces of each key; 0 for a key without pieces.

    pieces, starts: as in `Packing`.  One launch; 16-bit numbers are summed in float32.
    """
    batch, heads, places = tensor.shape[:3]
    keys = starts.shape[-1] - 1
    # The unused entries of `pieces` need bags too.  Small ones, because one thread loops over each bag.
    tail = torch.arange(1, ceil_div(places, TAIL), dtype=starts.dtype, device=starts.device) * TAIL
    bags = torch.cat([starts, (starts[..., -1:] + tail).clamp(max=places)], -1)
    before = places * torch.arange(batch * heads, device=starts.device).view(batch, heads, 1)
    summed = embedding_bag(
        (pieces + before).flatten(), tensor.reshape(batch * heads * places, -1), (bags + before).flatten(), mode="sum"
    )
    return summed.view(batch, heads, -1, *tensor.shape[3:])[:, :, :keys]
