"""What adaptive pruning of FoX loses is within the bound of docs/systems/lifespans.md, and the bound is met."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdma import lifespan_attention
from flexdma.lifespans.visible import causal_lifespans
from flexdma.policies import fox_delta, fox_lifespans
from tests.policies.slow_masks import union


def lost_weight(query, key, log_forget, lifespans):
    """[B, H, K]: the share of each query's attention that goes to keys that the lifespans prune."""
    total = log_forget.double().cumsum(-1)
    score = query @ key.mT / query.shape[-1] ** 0.5 + total[..., :, None] - total[..., None, :]
    causal = torch.ones_like(score[0, 0], dtype=torch.bool).tril()
    weight = score.masked_fill(~causal, -torch.inf).softmax(-1)
    return (weight * (causal & ~union(lifespans))).sum(-1)


def adversary(lifespans, radius, size):
    """Queries along one direction; keys that the last query does not see along it too, all others against it."""
    direction = torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0) * radius
    keys = lifespans.death.shape[-1]
    sign = torch.where(lifespans.death < keys, 1.0, -1.0).double()
    return direction.expand(*sign.shape, size), sign[..., None] * direction


@settings(max_examples=25)
@given(
    st.integers(1, 24), st.floats(0.1, 3.0), st.sampled_from([1e-6, 0.01, 0.5, 1.0]), st.floats(0.0, 6.0),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_lost_attention_and_the_error_of_the_output_are_within_the_bound(
    length, radius, tolerance, speed, hostile, seed
):
    generator = torch.Generator().manual_seed(seed)
    log_forget = -speed * torch.rand(1, 2, length, generator=generator)
    size = 8
    delta = fox_delta(radius**2 / size**0.5, length, tolerance)
    lifespans = fox_lifespans(log_forget, delta)
    query, key, value = torch.randn(3, 1, 2, length, size, dtype=torch.float64, generator=generator)
    query, key = (radius * torch.nn.functional.normalize(t, dim=-1) for t in (query, key))
    if hostile:
        query, key = adversary(lifespans, radius, size)
    lost = lost_weight(query, key, log_forget, lifespans)
    assert (lost < tolerance).all()
    bias = -log_forget.double().cumsum(-1)
    exact = lifespan_attention(query, key, value, causal_lifespans(key), bias=bias, lowering="gather")
    pruned = lifespan_attention(query, key, value, lifespans, bias=bias, lowering="gather")
    spread = value.amax(2, keepdim=True) - value.amin(2, keepdim=True)
    assert ((exact - pruned).abs() <= lost[..., None] * spread + 1e-12).all()


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_the_bound_is_met(bound):
    """All keys but the last query's own lie just below delta, with the largest logits against the smallest."""
    length, size, tolerance = 400, 4, 0.01
    delta = fox_delta(bound, length, tolerance)
    log_forget = torch.zeros(1, 1, length, dtype=torch.float64)
    log_forget[..., -1] = delta - 1e-9
    lifespans = fox_lifespans(log_forget, delta)
    assert (lifespans.death[..., :-1] == length - 1).all()
    query, key = adversary(lifespans, math.sqrt(bound * size**0.5), size)
    lost = lost_weight(query, key, log_forget, lifespans)[0, 0, -1].item()
    assert 0.98 * tolerance < lost < tolerance
    # Less pruning loses nothing here, more would exceed the tolerance.
    assert (fox_lifespans(log_forget, delta - 1e-6).death == length).all()


def test_delta_is_the_formula_of_the_paper():
    assert fox_delta(2.0, 100) == pytest.approx(-2 * 2.0 - math.log(100) - 10)
    bounds = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert fox_delta(bounds, 7, 0.1).tolist() == [[fox_delta(1.0, 7, 0.1), fox_delta(2.0, 7, 0.1)]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fox_lifespans(x, 0.5), ValueError, "delta: expected at most 0, got 0.5"),
        (lambda x: fox_lifespans(x, math.nan), ValueError, "delta: expected at most 0, got nan"),
        (
            lambda x: fox_lifespans(x, cast(Any, "auto")),
            TypeError,
            r"delta: expected a number or a tensor \[1, 2\], got str",
        ),
        (lambda x: fox_lifespans(x, torch.zeros(2)), ValueError, r"delta: expected \[1, 2\], got \[2\]"),
        (lambda x: fox_lifespans(-x, -1.0), ValueError, "log_forget: expected numbers of at most 0, got 1.0"),
        (lambda x: fox_delta(1.0, 0), ValueError, "length: expected at least 1, got 0"),
        (lambda x: fox_delta(1.0, 5, 0), ValueError, "tolerance: expected a number above 0, at most 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.full((1, 2, 5), -1.0))
