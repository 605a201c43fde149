"""What is measured: whole calls against attention to everything, each stage's share, packing, and memory of the masks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexdma import causal_top_w, dynamic_mask_attention, pack
from flexdma.bench.families import gate_families
from flexdma.block_metadata import block_metadata
from flexdma.lowerings.flex import BLOCK_SIZE
from flexdma.lowerings.gather import BLOCK_SIZE as QUERY_BLOCK
from flexdma.lowerings.gather import living_keys
from flexdma.offsets import reference_gate


@dataclass(frozen=True)
class Shape:
    """One problem: N positions, window w, heads and head size, forward only or with the backward."""

    length: int
    window: int
    backward: bool
    query_heads: int = 8
    heads: int = 2
    size: int = 64

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"{what}, N={self.length} w={self.window}"


SUITES: dict[str, tuple[Shape, ...]] = {
    "cpu": (
        Shape(16384, 1024, False),
        Shape(32768, 1024, False),
        Shape(4096, 256, True),
        Shape(8192, 512, True),
    ),
    "gpu": tuple(
        Shape(length, 1024, backward, 16, 4, 128) for length in (8192, 32768, 131072) for backward in (False, True)
    ),
    "quick": (Shape(4096, 256, False), Shape(2048, 128, True)),
}


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value in dtype, gate (iid) in float32; B = 1."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, h, shape.length, shape.size) for h in (shape.query_heads, shape.heads, shape.heads)]
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    gate = torch.randn(1, shape.heads, shape.length, generator=generator).to(device)
    return [t.requires_grad_(shape.backward) for t in (*tensors, gate)]


def contenders(shape: Shape, tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Name -> call.  The first is what the others are compared with."""
    query, key, value, gate = tensors
    on_cuda = query.is_cuda
    attend = partial(dynamic_mask_attention, query, key, value, gate, window_size=shape.window)
    compiled = torch.compile(dynamic_mask_attention, fullgraph=True, dynamic=False)
    calls: dict[str, Callable[[], Tensor]] = {
        "SDPA causal": partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True),
        "flexdma (default, eager call)": attend,
        "flexdma gather, compiled": partial(
            compiled, query, key, value, gate, window_size=shape.window, lowering="gather"
        ),
    }
    if not on_cuda and not shape.backward:
        # One batched expression holds all N (w + block) scores at once: no way to run long inference.
        del calls["flexdma gather, compiled"]
    if on_cuda or not shape.backward:
        calls["flexdma flex, compiled"] = partial(
            compiled, query, key, value, gate, window_size=shape.window, lowering="flex"
        )
    if on_cuda:
        del calls["flexdma gather, compiled"]
        calls["FlexAttention causal"] = _flex_causal(shape, tensors)
    return {name: partial(_step, call, tensors, shape.backward) for name, call in calls.items()}


def _flex_causal(shape: Shape, tensors: list[Tensor]) -> Callable[[], Tensor]:
    query, key, value, _ = tensors
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.length, shape.length, device=query.device)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def _step(call: Callable[[], Tensor], tensors: list[Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = call()
        if backward:
            for tensor in tensors:
                tensor.grad = None
            output.backward(torch.ones_like(output))


def stages(shape: Shape, tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The parts of a forward that are not attention, and the whole forwards that they are parts of."""
    query, key, value, gate = (t.detach() for t in tensors)
    group = shape.query_heads // shape.heads
    rows, columns = BLOCK_SIZE[query.device.type]
    birth, death = lifespans = causal_top_w(gate, shape.window)
    compiled = torch.compile(dynamic_mask_attention, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def whole(call: Callable[..., Tensor], lowering: str) -> Tensor:
        return call(query, key, value, gate, window_size=shape.window, lowering=lowering)

    return {
        "selection": lambda: causal_top_w(gate, shape.window),
        "reference gates": lambda: reference_gate(gate, lifespans),
        "packing": lambda: pack(lifespans, shape.window),
        "block mask": lambda: block_metadata(birth, death, shape.length, group, rows, columns, False),
        "living keys": lambda: living_keys(birth, death, shape.length, shape.window, QUERY_BLOCK),
        "gather, whole": lambda: whole(dynamic_mask_attention, "gather"),
        "flex, whole": lambda: whole(compiled, "flex"),
    }


def packing_ratios(length: int, window: int, rows: int, columns: int) -> dict[str, tuple[float, float]]:
    """Family -> visited blocks over the ideal N w, in natural order and packed; tiles of rows positions by columns keys."""
    ratios = {}
    for name, gate in gate_families(length).items():
        lifespans = causal_top_w(gate[None, None], window)
        visible = (lifespans.death - lifespans.birth).sum().item()
        order = pack(lifespans, window)
        packed = [t.gather(-1, order) for t in lifespans]
        counts = [block_metadata(b, d, length, 1, rows, columns, False) for b, d in (lifespans, packed)]
        natural, dense = ((c[0] + c[2]).sum().item() * rows * columns / visible for c in counts)
        ratios[name] = (natural, dense)
    return ratios


def mask_memory(shape: Shape, gate: Tensor) -> dict[str, Callable[[], object]]:
    """What builds masks and metadata, to be measured for peak memory."""
    group = shape.query_heads // shape.heads
    rows, columns = BLOCK_SIZE[gate.device.type]

    def flex() -> object:
        lifespans = causal_top_w(gate, shape.window)
        order = pack(lifespans, shape.window)
        birth, death = (t.gather(-1, order) for t in lifespans)
        return order, block_metadata(birth, death, shape.length, group, rows, columns, False)

    def gather() -> object:
        birth, death = causal_top_w(gate, shape.window)
        return living_keys(birth, death, shape.length, shape.window, QUERY_BLOCK)

    return {"flex": flex, "gather": gather}
