"""lifespan_attention for any lifespans, in every lowering: births before and after the key's own position, empty ones."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

import flexdma
from flexdma import Lifespans, lifespan_attention
from flexdma.lifespans.visible import best_visible, most_visible
from flexdma.reference import dense_lifespan_attention
from flexdma.score_mods import alibi_score_mod
from tests.comparison import inputs, with_gradients
from tests.lowerings.uncompiled_flex import lifespans_with_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def any_lifespans(batch, heads, keys, *, longest, seed, together=1):
    """Random lifespans: a tenth are empty, some begin before the first position or end after the last; births in groups."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, keys)
    birth = torch.randint(-3, keys + 3, shape, generator=generator) // together * together
    death = birth + torch.randint(0, longest + 1, shape, generator=generator)
    return Lifespans(birth, torch.where(torch.rand(shape, generator=generator) < 0.1, birth - 2, death))


CASES = {
    "square": {"sizes": (2, 4, 2, 40, 40, 8), "longest": 12},
    "few queries": {"sizes": (1, 4, 2, 5, 50, 8), "longest": 30},
    "one query": {"sizes": (2, 2, 1, 1, 33, 8), "longest": 60},
    "births together": {"sizes": (1, 4, 4, 60, 60, 8), "longest": 4, "together": 20},
    "shared by heads": {"sizes": (2, 4, 2, 30, 37, 8), "longest": 9, "heads": 1},
    "several periods": {"sizes": (1, 2, 1, 200, 220, 8), "longest": 9, "together": 5},
    "all of everything": {"sizes": (1, 2, 2, 20, 20, 8), "longest": 100, "together": 100},
}


def case(sizes, longest, heads=None, together=1, seed=0, bias=True):
    query, key, value, gate = inputs(*sizes, seed=seed)
    lifespans = any_lifespans(sizes[0], heads or sizes[2], sizes[4], longest=longest, together=together, seed=seed)
    return [query, key, value, *([gate] if bias else [])], lifespans


def called(function, lifespans, **options):
    """A function of query, key, value and bias."""

    def call(query, key, value, bias=None):
        return function(query, key, value, lifespans, bias=bias, **options)

    return call


LOWERINGS = {
    "gather": partial(lifespan_attention, lowering="gather", block_size=8),
    "dense": partial(lifespan_attention, lowering="dense"),
    "flex": lifespans_with_gradients,
    "flex, keys in their own order": partial(lifespans_with_gradients, packed=False),
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification_with_all_gradients(name, bias, lowering):
    tensors, lifespans = case(**CASES[name], bias=bias)
    for score_mod in (None, alibi_score_mod(torch.rand(tensors[0].shape[1]))):
        got = with_gradients(called(LOWERINGS[lowering], lifespans, score_mod=score_mod), tensors)
        want = with_gradients(called(dense_lifespan_attention, lifespans, score_mod=score_mod), tensors)
        # flex subtracts biases in float32; the rest is in float64.
        tolerance = 1e-5 if "flex" in lowering and bias else 1e-9
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_inference(name):
    """The fused path, for calls without gradients."""
    tensors, lifespans = case(**CASES[name])
    got = called(lifespan_attention, lifespans)(*tensors)
    torch.testing.assert_close(got, called(dense_lifespan_attention, lifespans)(*tensors), rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 30).flatmap(lambda keys: st.tuples(st.integers(1, keys), st.just(keys))), st.integers(1, 40),
    st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6),
)  # fmt: skip
def test_gather_for_any_sizes(lengths, longest, together, block, seed):
    queries, keys = lengths
    tensors, lifespans = case((1, 2, 1, queries, keys, 4), longest, together=together, seed=seed)
    want = called(dense_lifespan_attention, lifespans)(*tensors)
    query, key, value, bias = tensors
    for leaf in (False, True):  # fused, and with gradients
        got = lifespan_attention(query.clone().requires_grad_(leaf), key, value, lifespans, bias=bias, block_size=block)
        torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-9)


def test_compiled_without_reading_the_device():
    """fullgraph, with gradients: the shapes of the timeline depend only on K and Q."""
    tensors, lifespans = case(**CASES["square"])
    compiled = torch.compile(called(lifespan_attention, lifespans, capacity=12), fullgraph=True)
    got = with_gradients(compiled, tensors)
    want = with_gradients(called(dense_lifespan_attention, lifespans), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), want[0], rtol=1e-9, atol=1e-9)


def test_compiled_flex():
    """Inductor's C++ kernel, with periods that share their places."""
    tensors, lifespans = case((1, 2, 1, 300, 300, 8), longest=20)
    tensors = [t.float() for t in tensors]
    want = called(dense_lifespan_attention, lifespans)(*(t.double() for t in tensors))
    got = called(lifespan_attention, lifespans, lowering="flex")(*tensors)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_selection_is_one_of_many_lifespans():
    tensors = inputs(2, 4, 2, 50, 50, 8)
    alive = flexdma.causal_top_w(tensors[3], 7, sinks=1, recent=2)
    got = with_gradients(called(lifespan_attention, alive), tensors)
    want = with_gradients(partial(flexdma.dynamic_mask_attention, window_size=7, sinks=1, recent=2), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_bias_that_grows_costs_no_precision():
    """In a sliding window with falling biases the best bias so far is dead, so the reference is the best visible one."""
    query, key, value, gate = inputs(1, 2, 2, 64, 64, 8, dtype=torch.float32)
    alive = flexdma.sliding_window(gate, 5)
    falling = -1e7 * torch.arange(64, dtype=torch.float64) / 64 + torch.zeros(1, 2, 1, dtype=torch.float64)
    for bias in (falling, falling.flip(-1)):
        got = lifespan_attention(query, key, value, alive, bias=bias)
        exact = dense_lifespan_attention(query.double(), key.double(), value.double(), alive, bias=bias)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_nothing_visible_is_zero_and_nan_in_a_hidden_key_stays_there():
    tensors, _ = case(**CASES["square"])
    birth = torch.full((2, 2, 40), 20)
    lifespans = Lifespans(birth, torch.where(torch.arange(40) < 30, 25, birth))
    tensors[1][:, :, 35], tensors[2][:, :, 35] = float("nan"), float("inf")
    results = with_gradients(called(lifespan_attention, lifespans), tensors)
    assert not any(tensor.isnan().any() for tensor in results)
    seen = torch.zeros(40, dtype=torch.bool)
    seen[20:25] = True
    assert (results[0][:, :, ~seen] == 0).all()
    assert (results[0][:, :, seen] != 0).all()


@given(st.integers(1, 4), st.integers(4, 40), st.integers(1, 30), st.integers(0, 10**6))
def test_keys_that_died_before_the_queries_take_no_room(queries, keys, longest, seed):
    """In order, with the exact capacity: keys that only earlier positions see neither count nor reach a query."""
    tensors, (_, spans) = case((1, 2, 1, queries, keys, 4), longest, seed=seed)
    position = torch.arange(keys)
    alive = Lifespans(position.expand_as(spans), position + spans % longest)
    tensors[1][:, :, alive.death[0, 0] <= keys - queries] = float("nan")
    options = {"capacity": max(1, most_visible(alive, queries)), "in_order": True}
    want = with_gradients(called(dense_lifespan_attention, alive), tensors)
    got = with_gradients(called(lifespan_attention, alive, **options), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        inferred = called(lifespan_attention, alive, **options)(*tensors)
    torch.testing.assert_close(inferred, want[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_bias_of_minus_infinity_hides(lowering):
    """A bias of -inf, as users write padding; queries that see no other key give 0."""
    tensors, _ = case(**CASES["square"])
    tensors[3][..., :3] = float("-inf")
    whole = Lifespans(torch.arange(40).expand(2, 2, 40), torch.full((2, 2, 40), 40))
    got = with_gradients(called(LOWERINGS[lowering], whole), tensors)
    want = with_gradients(called(dense_lifespan_attention, whole), tensors)
    assert (got[0][:, :, :3] == 0).all()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_nan_in_an_evicted_key_reaches_no_later_query():
    """A key that the selection evicted before the first query."""
    key, gate = torch.randn(1, 1, 5, 4), torch.tensor([[[-1.0, 2.0, 3.0, 4.0, 5.0]]])
    key[:, :, 0] = float("nan")
    query = torch.randn(1, 1, 1, 4, requires_grad=True)
    assert flexdma.dynamic_mask_attention(query, key, torch.randn(1, 1, 5, 4), gate, window_size=2).isfinite().all()


def test_inside_torch_func():
    tensors, lifespans = case(**CASES["births together"])

    def loss(function):
        return lambda *each: called(function, lifespans)(*each).square().sum()

    got = grad(loss(lifespan_attention), argnums=(0, 1, 2, 3))(*tensors)
    want = grad(loss(dense_lifespan_attention), argnums=(0, 1, 2, 3))(*tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 30), st.integers(0, 10**6))
def test_what_queries_see(queries, more, longest, seed):
    keys = queries + more - 1
    lifespans = any_lifespans(1, 2, keys, longest=longest, seed=seed)
    bias = torch.randint(-3, 4, (1, 2, keys), generator=torch.Generator().manual_seed(seed)).float()
    bias[bias == 3] = float("inf")  # not finite, so never the reference
    position = torch.arange(keys - queries, keys)[:, None]
    visible = (lifespans.birth[..., None, :] <= position) & (position < lifespans.death[..., None, :])
    assert most_visible(lifespans, queries) == visible.sum(-1).max()
    best = best_visible(bias, lifespans.birth, lifespans.death, queries)[0]
    for head in range(2):
        for i in range(queries):
            seen = [
                (bias[0, head, j].item(), j) for j in range(keys) if visible[0, head, i, j] and bias[0, head, j] < 3
            ]
            assert best[0, head, i] == (max(seen)[1] if seen else -1)


TENSORS = [t.float() for t in inputs(1, 2, 2, 4, 4, 8)]
BIRTH = torch.zeros(1, 2, 4, dtype=torch.int32)
WRONG = [
    ({"lifespans": BIRTH}, TypeError, r"lifespans: expected Lifespans\(birth, death\), got Tensor"),
    (
        {"lifespans": (BIRTH, BIRTH.float())},
        TypeError,
        "lifespans.death: expected torch.int32 or torch.int64, got torch.float32",
    ),
    ({"lifespans": (BIRTH[..., :3], BIRTH)}, ValueError, r"lifespans.birth: expected \[1, 2, 4\], got \[1, 2, 3\]"),
    (
        {"lifespans": (BIRTH, BIRTH[:, :1])},
        ValueError,
        r"lifespans.death: expected \[1, 2, 4\] as birth, got \[1, 1, 4\]",
    ),
    ({"bias": torch.zeros(1, 3, 4)}, ValueError, r"bias: expected \[1, 2, 4\], got \[1, 3, 4\]"),
    ({"bias": BIRTH}, TypeError, "bias: expected a floating point dtype, got torch.int32"),
    ({"capacity": 3}, ValueError, "capacity: expected at least 4, the most keys that one query sees, got 3"),
    ({"capacity": 2.0}, TypeError, "capacity: expected an int, got float"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_names_the_argument(wrong, error, message):
    arguments: dict[str, Any] = {"lifespans": Lifespans(BIRTH, BIRTH + 4)} | wrong
    with pytest.raises(error, match=message):
        lifespan_attention(*TENSORS[:3], **arguments)
