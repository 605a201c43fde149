"""The gradient of packing: keys come back to where they were taken from, without an atomic operation."""

import torch

from flexdma.lowerings.flex import _Permuted


def test_the_gradient_of_a_permutation_is_its_inverse():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    order = torch.rand(2, 3, 7, generator=generator).argsort(-1)
    assert torch.autograd.gradcheck(lambda k: _Permuted.apply(k, order, order.argsort(-1)), keys)


def test_a_permutation_shared_by_all_heads_and_gates_without_a_head_size():
    gate = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7).view(1, 1, 7).expand(2, 3, 7)
    packed = _Permuted.apply(gate, order, order.argsort(-1))
    torch.testing.assert_close(packed, gate.gather(-1, order))
    weights = torch.randn(2, 3, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((packed * weights).sum(), gate)
    (expected,) = torch.autograd.grad((gate.gather(-1, order) * weights).sum(), gate)
    torch.testing.assert_close(gradient, expected)
