"""Each policy runs through lifespan_attention, is traced whole by torch.compile, and knows fake tensors and vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexdma import Lifespans, lifespan_attention, policies
from tests.policies.slow_masks import dense_attention, union

BATCH, HEADS, KEYS, SIZE = 2, 2, 16, 8


def flash_mask(query, key, number, **_):
    indices = torch.sort((number[..., None] * torch.arange(1.0, 5.0)).long() % 17, dim=-1).values
    return policies.flash_mask_lifespans(indices[..., :2].flip(-1), causal=False)


# Functions of query, key, a number per key, padding and documents.
POLICIES: dict[str, Callable[..., Any]] = {
    "dms": lambda q, k, x, **o: policies.dms_lifespans(x, 3, **o),
    "flash_mask, causal": lambda q, k, x, **_: policies.flash_mask_lifespans((x * 10).long()[..., None], causal=True),
    "flash_mask, bidirectional": flash_mask,
    "fox": lambda q, k, x, **o: policies.fox_lifespans(-x.abs(), -2.0, **o),
    "h2o": lambda q, k, x, **o: policies.h2o_lifespans(q, k, 2, 3, chunk=2, **o),
    "hax": lambda q, k, x, **o: policies.hax_lifespans(x, [3, 4], **o),
    "kvzap": lambda q, k, x, **o: policies.kvzap_lifespans(x, 0.0, 2, **o),
    "moa": lambda q, k, x, **o: policies.moa_lifespans(k, [2, 3], [0.2, 0.1], sinks=1, **o),
    "snapkv": lambda q, k, x, key_padding_mask=None, **_: policies.snapkv_lifespans(
        q, k, 6, prompt_length=11, observed=3, key_padding_mask=key_padding_mask
    ),
    "streaming_llm": lambda q, k, x, **o: policies.streaming_llm_lifespans(k, 3, sinks=2, **o),
    "trim_kv": lambda q, k, x, **o: policies.trim_kv_lifespans(-x.abs(), 4, **o),
}  # fmt: skip


# Policies with a bias for each interval have tests of their own.
WITH_BIASES = {"dms_training", "fsa"}


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, 2 * HEADS, KEYS, SIZE, generator=generator, dtype=dtype)
    key, value = torch.randn(2, BATCH, HEADS, KEYS, SIZE, generator=generator, dtype=dtype)
    number = torch.randn(BATCH, HEADS, KEYS, generator=generator)
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    mask[0, :3] = False
    documents = torch.arange(KEYS).expand(BATCH, -1) // torch.tensor([[9], [12]])
    return query, key, value, number, {"key_padding_mask": mask, "document_ids": documents}


def alone(lifespans):
    """The Lifespans of a policy with one interval per key."""
    if isinstance(lifespans, Lifespans):
        return lifespans
    (only,) = lifespans
    return only


def test_every_policy_is_here():
    names = {name.removesuffix("_lifespans") for name in policies.__all__ if name.endswith("_lifespans")}
    assert names - WITH_BIASES == {name.split(",")[0] for name in POLICIES}


@pytest.mark.parametrize("name", POLICIES)
def test_attention_over_the_lifespans_is_attention_under_the_mask(name):
    query, key, value, number, masks = tensors()
    lifespans = alone(POLICIES[name](query, key, number, **masks))
    mask = union(lifespans)
    assert 0 < mask.double().mean() < 1
    bias = number.double()
    got = lifespan_attention(query, key, value, lifespans, bias=bias, lowering="gather")
    torch.testing.assert_close(got, dense_attention(query, key, value, mask, bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_of_a_batch_is_as_alone(name):
    query, key, _, number, masks = tensors()
    together = POLICIES[name](query, key, number, **masks)
    for row in range(BATCH):
        one = slice(row, row + 1)
        single = POLICIES[name](query[one], key[one], number[one], **{n: mask[one] for n, mask in masks.items()})
        assert torch.equal(union(single)[0], union(together)[row])


def test_torch_compile_traces_every_policy_without_a_graph_break():
    query, key, _, number, masks = tensors()

    def every(query, key, number):
        return {name: tuple(policy(query, key, number, **masks)) for name, policy in POLICIES.items()}

    got = torch.compile(every, backend="eager", fullgraph=True)(query, key, number)
    want = every(query, key, number)
    for name in POLICIES:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_torch_export_refuses_a_loop_over_positions():
    class Trimmed(torch.nn.Module):
        def forward(self, number):
            return tuple(policies.trim_kv_lifespans(-number.abs(), 4))

    with pytest.raises(
        Exception, match=r"torch.export: expected lifespans from outside .* as trim_kv_deaths is a loop"
    ):
        torch.export.export(Trimmed(), (torch.randn(1, 2, 16),))


@pytest.mark.parametrize("name", POLICIES)
def test_fake_tensors_give_shapes(name):
    query, key, _, number, masks = tensors()
    want = alone(POLICIES[name](query, key, number, **masks))
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, number, *given = (torch.empty_like(t) for t in (query, key, number, *masks.values()))
        got = alone(POLICIES[name](query, key, number, **dict(zip(masks, given, strict=True))))
    assert [(bound.shape, bound.dtype) for bound in got] == [(bound.shape, bound.dtype) for bound in want]


@pytest.mark.parametrize("name", ["fox", "trim_kv", "h2o", "dms", "hax"])
def test_vmap_maps_every_row(name):
    query, key, _, number, _ = tensors()
    mapped = torch.func.vmap(lambda q, k, x: tuple(POLICIES[name](q[None], k[None], x[None])))(query, key, number)
    want = POLICIES[name](query, key, number)
    for got, bound in zip(mapped, want, strict=True):
        assert torch.equal(got[:, 0], bound)


def test_selection_has_no_gradient():
    query, key, _, number, _ = tensors()
    leaves = [t.requires_grad_() for t in (query, key, number)]
    for policy in POLICIES.values():
        assert not any(bound.requires_grad for bound in alone(policy(*leaves)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda k, x: policies.dms_lifespans(x.int(), 3),
            TypeError,
            "alpha: expected a floating point dtype, got torch.int32",
        ),
        (lambda k, x: policies.dms_lifespans(x, 0), ValueError, "window_size: expected at least 1, got 0"),
        (lambda k, x: policies.kvzap_lifespans(x[0], 0.0), ValueError, r"score: expected \[B, Hkv, K\], got \[2, 16\]"),
        (lambda k, x: policies.kvzap_lifespans(x, torch.nan), TypeError, "threshold: expected a number, got nan"),
        (lambda k, x: policies.hax_lifespans(x[0], 2), ValueError, r"score: expected \[B, Hkv, K\]"),
        (
            lambda k, x: policies.trim_kv_lifespans(x, [1, 2, 3]),
            ValueError,
            "capacity: expected one int per key/value head = 2",
        ),
        (lambda k, x: policies.trim_kv_lifespans(x, 2, chunk=0), ValueError, "chunk: expected at least 1, got 0"),
        (lambda k, x: policies.streaming_llm_lifespans(x, 3), ValueError, r"key: expected \[B, Hkv, K, D\]"),
        (
            lambda k, x: policies.streaming_llm_lifespans(k, 3, sinks=-1),
            ValueError,
            "sinks: expected at least 0, got -1",
        ),
        (
            lambda k, x: policies.moa_lifespans(k, [1], [0, 0]),
            ValueError,
            "alpha: expected one number per key/value head = 2",
        ),
        (
            lambda k, x: policies.moa_lifespans(k, [9, 3], [0, 0], sinks=4),
            ValueError,
            r"spans above the 4 sinks, got \[9, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    _, key, _, number, _ = tensors()
    with pytest.raises(error, match=message):
        call(key, number)
