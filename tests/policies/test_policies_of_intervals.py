"""Policies with several intervals per key equal dense masks made from their definitions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention, softplus
from torch.testing import assert_close

from flexdma import lifespan_attention
from flexdma.policies import dms_training_lifespans, flash_mask_lifespans, fsa_lifespans
from tests.comparison import inputs, with_gradients


def masks(batch, keys, *, seed):
    """Options of the policies, and [B, 1, K, K] which pairs they allow: the same document, and a real key."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(batch, keys, generator=generator) < 0.8
    documents = torch.randint(0, 2, (batch, keys), generator=generator).cumsum(-1) // 3
    together = documents[:, None, :, None] == documents[:, None, None, :]
    return {"key_padding_mask": real, "document_ids": documents}, together & real[:, None, None, :]


def age(keys):
    """i - j, [K, K]."""
    return torch.arange(keys)[:, None] - torch.arange(keys)


def seen(lifespans, keys):
    """[P, B, H, K, K] bool: whether query i is in each interval of key j."""
    i = torch.arange(keys)[:, None]
    visible = [(birth[..., None, :] <= i) & (i < death[..., None, :]) for birth, death in lifespans]
    return torch.stack(torch.broadcast_tensors(*visible))


@given(st.integers(1, 20), st.integers(0, 8), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=15)
def test_dms_training(queries, more, masked, seed):
    """The score gets log(1 - sigmoid(alpha)) where the key is older than its window; gradients reach alpha."""
    keys, windows = queries + more, [3, 7]
    tensors = inputs(2, 4, 2, queries, keys, 4, seed=seed)
    options, allowed = masks(2, keys, seed=seed) if masked else ({}, torch.ones(keys, keys, dtype=torch.bool))
    old = age(keys) >= torch.tensor(windows).view(-1, 1, 1)
    visible = (allowed & (age(keys) >= 0)).expand(2, 2, -1, -1)[:, :, more:]

    def by_definition(query, key, value, alpha):
        added = torch.where(old, -softplus(alpha)[:, :, None, :], 0.0)[:, :, more:].masked_fill(~visible, -torch.inf)
        nothing = ~visible.any(-1, keepdim=True)
        mask = added.masked_fill(nothing, 0.0).repeat_interleave(2, 1)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.masked_fill(nothing.repeat_interleave(2, 1), 0.0)

    def by_intervals(query, key, value, alpha):
        lifespans, biases = dms_training_lifespans(alpha, windows, **options)
        return lifespan_attention(query, key, value, lifespans, bias=biases)

    got, want = (with_gradients(function, tensors) for function in (by_intervals, by_definition))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_dms_training_in_low_precision_and_with_certain_decisions():
    """The bias of bfloat16 logits is float32; an alpha of infinity hides a key after its window, of -infinity never."""
    alpha = torch.tensor([[[torch.inf, -torch.inf, 20.0, -20.0]]], dtype=torch.bfloat16)
    _, (none, bias) = dms_training_lifespans(alpha, 2)
    assert none is None
    assert_close(bias, torch.tensor([[[-torch.inf, 0, -20, -2.061e-9]]]), rtol=1e-3, atol=1e-12)
    lifespans, biases = dms_training_lifespans(alpha.float(), 2)
    query = torch.zeros(1, 1, 4, 4)
    output = lifespan_attention(query, query, torch.eye(4)[None, None], lifespans, bias=biases)
    assert_close(output[0, 0, 3], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))


@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(0, 6), st.integers(0, 9), st.integers(0, 4), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_fsa(keys, window, gap, band, sinks, masked, seed):
    """FSA's mask of `near` = i - j, without its padding; here sinks are the first real keys of a document."""
    key = torch.zeros(2, 2, keys, 4)
    options, allowed = masks(2, keys, seed=seed) if masked else ({}, torch.ones(2, 1, keys, keys, dtype=torch.bool))
    gaps, bands = [gap, 2 * gap + 1], [band + 1, band]
    found = seen(fsa_lifespans(key, window, gaps, bands, sinks=sinks, **options), keys)
    near, begin = age(keys), window + torch.tensor(gaps).view(-1, 1, 1)
    inside = (near < window) | ((near >= begin) & (near < begin + torch.tensor(bands).view(-1, 1, 1)))
    is_sink = (allowed & (near >= 0)).sum(-1)[..., None, :] <= sinks
    assert torch.equal(found.any(0), (allowed & (near >= 0) & (inside | is_sink)).expand(2, 2, -1, -1))
    assert found.sum(0).max() <= 1


def test_heads_of_fsa_see_every_key_together():
    """Bands that follow each other over the heads, as FSA sets them."""
    lifespans = fsa_lifespans(torch.zeros(1, 4, 40, 4), 8, [0, 7, 14, 21], [7, 7, 7, 11], sinks=2)
    found = seen(lifespans, 40).any(0)[0]
    assert torch.equal(found.any(0), age(40) >= 0)
    assert found[0].sum(-1).max() == 8 + 7 + 2


def test_flash_mask_with_three_intervals():
    """Bidirectional FlashMask masks two runs of rows per key, so that a key is seen in up to three intervals."""
    query, key, value, _ = inputs(1, 4, 2, 20, 20, 4)
    rows = torch.randint(0, 21, (1, 2, 20, 4), generator=torch.Generator().manual_seed(0)).sort(-1).values
    lifespans = flash_mask_lifespans(rows, causal=False)
    assert len(lifespans) == 3
    i, (a, b, c, d) = torch.arange(20)[:, None], (rows[..., None, :, n] for n in range(4))
    mask = ~(((a <= i) & (i < b)) | ((c <= i) & (i < d))).repeat_interleave(2, 1)
    want = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    got = lifespan_attention(query, key, value, lifespans)
    assert_close(got, want.masked_fill(~mask.any(-1, keepdim=True), 0.0), rtol=1e-9, atol=1e-9)


def test_torch_compile_traces_them_without_a_graph_break():
    key, alpha, (options, _) = torch.zeros(2, 2, 9, 4), torch.randn(2, 2, 9), masks(2, 9, seed=0)

    def both(key, alpha):
        return dms_training_lifespans(alpha, [2, 3], **options), fsa_lifespans(key, 2, 1, [2, 3], sinks=1, **options)

    got, want = torch.compile(both, backend="eager", fullgraph=True)(key, alpha), both(key, alpha)
    assert_close(got[0][1][1], want[0][1][1])
    for a, b in zip((*got[0][0], *got[1]), (*want[0][0], *want[1]), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


KEY = torch.zeros(1, 2, 4, 4)
WRONG_TYPE: Any = 2.0
WRONG: list[tuple[Any, type, str]] = [
    (lambda: dms_training_lifespans(KEY, 2), ValueError, r"alpha: expected \[B, Hkv, K\], got \[1, 2, 4, 4\]"),
    (lambda: dms_training_lifespans(KEY[..., 0].int(), 2), TypeError, "alpha: expected a floating point dtype"),
    (lambda: dms_training_lifespans(KEY[..., 0], 0), ValueError, "window_size: expected at least 1, got 0"),
    (lambda: fsa_lifespans(KEY, 2, -1, 2), ValueError, "gap: expected at least 0, got -1"),
    (lambda: fsa_lifespans(KEY, 2, 1, [2, 2, 2]), ValueError, "band: expected one int per key/value head = 2, got 3"),
    (
        lambda: fsa_lifespans(KEY, 2, 1, WRONG_TYPE),
        TypeError,
        "band: expected an int or one int per key/value head, got float",
    ),
    (
        lambda: fsa_lifespans(KEY, WRONG_TYPE, 1, 2),
        TypeError,
        "window_size: expected an int or one int per key/value head",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
