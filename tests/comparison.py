"""Comparison of an implementation with the dense specification, in outputs and gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import flexdma
from flexdma.lowerings.gate_gradient import gate_gradient_route
from flexdma.reference import dense_dynamic_mask_attention


def inputs(
    batch, query_heads, heads, queries, keys, size, value_size=None, *, dtype=torch.float64, gate_heads=None, seed=0
):
    """query, key, value, gate; gates are float32 unless dtype is float64, with ties in every third position."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate = normal(batch, gate_heads or heads, keys)
    gate[..., ::3] = gate[..., ::3].round()
    tensors = [normal(batch, query_heads, queries, size), normal(batch, heads, keys, size)]
    tensors += [normal(batch, heads, keys, value_size or size)]
    return [t.to(dtype) for t in tensors] + [gate.to(torch.float64 if dtype == torch.float64 else torch.float32)]


def with_gradients(function, tensors, *captured, **options):
    """Output of function(*tensors, **options), and the gradients of all tensors (and captured ones) for a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(output, [*leaves, *captured], cotangent.to(output))
    return [output.detach(), *gradients]


def gradients_of(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the gradients of tensors, which must all have one."""
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad.clone())
    return gradients


def assert_same(function, tensors, *, tolerance, gradients=True, dense_options=None, **options):
    """Function equals the float64 specification within tolerance (of each result's largest value)."""
    exact = [t.detach().double() for t in tensors]
    dense = {**options, **(dense_options or {})}
    if gradients:
        got = with_gradients(function, tensors, **options)
        want = with_gradients(dense_dynamic_mask_attention, exact, **dense)
    else:
        with torch.no_grad():
            got, want = [function(*tensors, **options)], [dense_dynamic_mask_attention(*exact, **dense)]
    for name, a, b in zip(("output", "query", "key", "value", "gate"), got, want, strict=False):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"NaN in {name}"
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"{name}: error {error}"


def gather(*tensors: Tensor | None, **options) -> Tensor:
    """The operator by the gather lowering."""
    attend: Any = flexdma.dynamic_mask_attention
    return attend(*tensors, lowering="gather", **options)


def by_atomics(*tensors: Tensor, **options) -> Tensor:
    """The operator with the gate's gradient by the route "atomics"."""
    with gate_gradient_route("atomics"):
        return flexdma.dynamic_mask_attention(*tensors, **options)
