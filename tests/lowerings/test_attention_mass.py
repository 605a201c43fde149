"""attention_mass equals its dense definition in float64, in every lowering, without a Q x K tensor."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import flexdma
from flexdma import Lifespans, attention_mass, checks
from flexdma.lifespans.terms import as_terms, bias_of_terms
from flexdma.lifespans.visible import births_are_positions, causal_lifespans, most_visible
from flexdma.lowerings.flex_mass import flex_mass
from flexdma.reference import dense_attention_mass
from flexdma.score_mods import alibi_score_mod
from tests.comparison import inputs
from tests.lowerings.test_lifespan_attention import any_lifespans

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BANDS = [None, [(0, None)], [(0, 3), (3, None)], [(2, 30), (5, 6), (1000, None)]]


def same(got, want, tolerance=1e-12):
    """Equal in shape, dtype and values, NaN included."""
    assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_literal():
    """Equal scores: query i gives 1 / (i + 1) to each key."""
    query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)
    want = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    assert_close(attention_mass(query, key), 2 * torch.tensor([[want]]))  # two query heads
    assert_close(attention_mass(query, key, reduction="max"), torch.tensor([[[1, 1 / 2, 1 / 3, 1 / 4]]]))
    own, later = attention_mass(query, key, reduction="max", ages=[(0, 1), (2, None)])
    assert_close(own, torch.tensor([[[1, 1 / 2, 1 / 3, 1 / 4]]]))
    assert_close(later, torch.tensor([[[1 / 3, 1 / 4, 0, 0]]]))


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 20), st.sampled_from(["sum", "max"]),
    st.sampled_from(BANDS), st.sampled_from([1, 7, 16, None]), st.booleans(), st.data(),
)  # fmt: skip
@settings(max_examples=100)
def test_any_shape_lifespans_and_ages(heads, group, queries, more, reduction, ages, block, with_bias, data):
    keys = queries + more
    query, key, _, gate = inputs(2, heads * group, heads, queries, keys, 4, seed=keys)
    lifespans = None
    if data.draw(st.booleans()):
        shared = data.draw(st.booleans())
        longest = data.draw(st.integers(0, keys))
        lifespans = any_lifespans(2, 1 if shared else heads, keys, longest=longest, seed=keys)
    gate[gate < -1] = -torch.inf
    options: dict[str, Any] = {"reduction": reduction, "ages": ages, "bias": gate if with_bias else None}
    want = dense_attention_mass(query, key, lifespans, **options)
    same(attention_mass(query, key, lifespans, block_size=block, **options), want)


def test_every_query_gives_one_away_if_it_sees_a_key():
    query, key, _, gate = inputs(1, 4, 2, 60, 80, 8)
    alive = flexdma.causal_top_w(gate, 5)
    assert_close(attention_mass(query, key).sum(), torch.tensor(4.0 * 60, dtype=torch.float64))
    assert_close(attention_mass(query, key, alive).sum(), torch.tensor(4.0 * 60, dtype=torch.float64))
    late = Lifespans(alive.birth.clamp(min=50), alive.death)
    assert_close(attention_mass(query, key, late).sum(), torch.tensor(4.0 * 30, dtype=torch.float64))
    bands = attention_mass(query, key, alive, ages=[(0, 4), (4, 17), (17, None)])
    same(bands.sum(0), attention_mass(query, key, alive))


@pytest.mark.parametrize("lifespans", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_score_mod_scale_and_a_head_larger_than_a_block(reduction, lifespans):
    query, key, _, gate = inputs(1, 4, 2, 30, 45, 300)
    alive = flexdma.causal_top_w(gate, 9) if lifespans else None
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def score_mod(score, b, h, i, j):
        return torch.where(i == 20, -torch.inf, alibi_score_mod(slopes)(score, b, h, i, j) + (i - j) % 3)

    options: dict[str, Any] = {"reduction": reduction, "score_mod": score_mod, "scale": 0.3, "bias": gate}
    got = attention_mass(query, key, alive, block_size=8, **options)
    same(got, dense_attention_mass(query, key, alive, **options).detach())
    assert not got.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("where", ["query", "key", "bias", "hidden key"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_reach_what_they_reach_in_the_definition(number, where, reduction):
    query, key, _, bias = inputs(2, 4, 2, 40, 40, 8)
    key[:, :, 20, 0] = key[:, :, 20, 0].abs() + 1
    alive = any_lifespans(2, 2, 40, longest=9, seed=3)
    alive.birth[..., 20], alive.death[..., 20] = (20, 20) if where == "hidden key" else (20, 27)
    {"query": query, "key": key, "bias": bias, "hidden key": key}[where][:, :, 20, ...] = number
    for lifespans in (alive, None):
        for block in (4, 64):
            options: dict[str, Any] = {"reduction": reduction, "bias": bias if where == "bias" else None}
            want = dense_attention_mass(query, key, lifespans, ages=[(0, 5), (2, None)], **options)
            got = attention_mass(query, key, lifespans, ages=[(0, 5), (2, None)], block_size=block, **options)
            same(got, want)


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_a_hidden_key_receives_nothing_from_a_query_that_sees_a_nan(reduction):
    query, key, _, bias = inputs(1, 2, 1, 12, 12, 8)
    bias[..., 2], bias[..., 5] = -torch.inf, torch.nan
    for lifespans in (None, flexdma.sliding_window(bias, 6)):
        options: dict[str, Any] = {"reduction": reduction, "bias": bias}
        want = dense_attention_mass(query, key, lifespans, **options)
        assert want[0, 0, 2] == 0
        assert want[0, 0, 3].isnan()
        same(attention_mass(query, key, lifespans, **options), want)


def test_a_bias_that_grows_costs_no_precision():
    query, key, _, gate = inputs(1, 2, 2, 64, 64, 8, dtype=torch.float32)
    alive = flexdma.sliding_window(gate, 5)
    bias = 1e7 * torch.arange(64, dtype=torch.float64) / 64 + torch.zeros(1, 2, 1, dtype=torch.float64)
    want = dense_attention_mass(query.double(), key.double(), alive, bias=bias).float()
    same(attention_mass(query, key, alive, bias=bias), want, 1e-5)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_reduced_in_float32(dtype, reduction):
    """The only error is that of float32: a sum in bfloat16 would stop growing at 256."""
    query, key, _, _ = inputs(1, 4, 2, 600, 600, 16, dtype=dtype)
    got = attention_mass(query, key, reduction=reduction)
    assert got.dtype == torch.float32
    same(got, dense_attention_mass(query.double(), key.double(), reduction=reduction).float(), 1e-5)


def test_under_autocast_it_is_the_call_on_cast_inputs():
    query, key, _, gate = inputs(1, 4, 2, 40, 60, 16, dtype=torch.float32)
    alive = flexdma.causal_top_w(gate, 9)
    for lowering in (None, "dense"):
        want = attention_mass(query.bfloat16(), key.bfloat16(), alive, bias=gate, lowering=lowering)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention_mass(query, key, alive, bias=gate, lowering=lowering), want)


def flex(query, key, lifespans=None, *, ages=None, bias=None, score_mod=None):
    """`attention_mass` by the flex lowering, uncompiled, in small blocks."""
    queries, size, keys = query.shape[2], query.shape[3], key.shape[2]
    in_order, capacity, alive = True, keys, causal_lifespans(key)
    if lifespans is not None:
        intervals, biases = checks.intervals(lifespans, bias, key)
        alive, bias = as_terms(intervals, keys), bias_of_terms(biases)
        in_order, capacity = len(intervals) == 1 and births_are_positions(alive), max(1, most_visible(alive, queries))
    bands = None if ages is None else [(low, checks.LARGEST if high is None else high) for low, high in ages]
    mass = flex_mass(
        query, key, bias, alive, in_order=in_order, capacity=capacity, scale=size**-0.5, score_mod=score_mod, ages=bands,
        block_size=(16, 16), kernel_options=None,
    )  # fmt: skip
    return mass[:, 0] if ages is None else mass.transpose(0, 1)


FLEX_CASES: dict[str, tuple] = {
    "causal": ((2, 4, 2, 40, 50, 8), None, [(2, 30), (1000, None)]),
    "several periods": ((1, 4, 2, 100, 110, 8), lambda gate: flexdma.causal_top_w(gate, 9), None),
    "any births, shared by heads": (
        (2, 4, 2, 40, 50, 8), lambda gate: any_lifespans(2, 1, 50, longest=20, seed=1), [(0, 3), (3, None)],
    ),
    "one query": ((1, 2, 1, 1, 33, 8), lambda gate: any_lifespans(1, 1, 33, longest=60, seed=1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEX_CASES)
def test_by_transposed_attention(name):
    sizes, policy, ages = FLEX_CASES[name]
    query, key, _, gate = inputs(*sizes)
    alive = None if policy is None else policy(gate)
    gate[..., 3] = -torch.inf
    # Biases are subtracted in float32; the rest is in float64.
    for bias, tolerance in ((None, 1e-12), (gate, 1e-5)):
        score_mod = None if bias is None else alibi_score_mod(torch.rand(query.shape[1], dtype=torch.float64))
        options: dict[str, Any] = {"ages": ages, "bias": bias, "score_mod": score_mod}
        same(flex(query, key, alive, **options), dense_attention_mass(query, key, alive, **options), tolerance)


def test_nan_by_transposed_attention():
    query, key, _, bias = inputs(1, 2, 1, 40, 40, 8)
    query[:, :, 20], bias[..., 18] = torch.nan, -torch.inf
    alive = any_lifespans(1, 1, 40, longest=9, seed=1)
    for added in (None, bias):
        same(flex(query, key, alive, bias=added), dense_attention_mass(query, key, alive, bias=added), 1e-5)


def test_transposed_attention_is_one_graph():
    query, key, _, gate = inputs(1, 4, 2, 40, 50, 8)
    options: dict[str, Any] = {"ages": [(0, 9), (9, None)], "bias": gate}
    compiled = torch.compile(partial(flex, **options), fullgraph=True, backend="aot_eager")
    same(compiled(query, key), dense_attention_mass(query, key, **options), 1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_no_tensor_is_as_large_as_queries_times_keys(reduction):
    query, key, _, gate = inputs(1, 4, 2, 512, 512, 8, dtype=torch.float32)
    alive = flexdma.sliding_window(gate, 32)
    sizes = []
    # With a score_mod the blocks are no opaque operator, whose inside the mode does not see.
    for lifespans in (None, alive):
        with Largest() as largest:
            attention_mass(
                query, key, lifespans, reduction=reduction, ages=[(0, 100), (128, None)], block_size=16,
                score_mod=lambda score, *_: score,
            )  # fmt: skip
        sizes.append(largest.elements)
    assert sizes[0] == 4 * 16 * 512  # the probabilities of a block
    assert sizes[1] == 4 * 512 * 8  # no more than the queries: a block of 16 sees 47 keys


def test_compiled_it_is_one_operator_for_all_lengths():
    compiled = torch.compile(partial(attention_mass, reduction="max", ages=[(0, 9), (9, None)]), fullgraph=True)
    for length in (40, 50, 61):
        query, key, _, gate = inputs(1, 4, 2, length, length, 8, dtype=torch.float32, seed=length)
        alive = flexdma.causal_top_w(gate, 9)
        same(compiled(query, key, alive), attention_mass(query, key, alive, reduction="max", ages=[(0, 9), (9, None)]))
    query.requires_grad_()
    assert not compiled(query, key, alive).requires_grad


def test_traced_blocks_read_nothing():
    """With a score_mod compiled code contains the blocks."""
    query, key, _, gate = inputs(1, 4, 2, 40, 50, 8)
    options: dict[str, Any] = {"bias": gate, "score_mod": alibi_score_mod(torch.rand(4)), "ages": [(0, 9), (12, 31)]}
    for lifespans in (None, any_lifespans(1, 2, 50, longest=9, seed=1)):
        compiled = torch.compile(partial(attention_mass, block_size=16, **options), fullgraph=True, backend="eager")
        same(compiled(query, key, lifespans), dense_attention_mass(query, key, lifespans, **options))


def test_inside_torch_func():
    query, key, _, gate = (
        torch.stack(pair) for pair in zip(*(inputs(2, 4, 2, 9, 12, 8, seed=n) for n in (0, 1)), strict=True)
    )
    alive = Lifespans(*map(torch.stack, zip(*(flexdma.causal_top_w(each, 5) for each in gate), strict=True)))
    got = torch.func.vmap(lambda q, k, *alive: attention_mass(q, k, Lifespans(*alive)))(query, key, *alive)
    for n in (0, 1):
        same(got[n], dense_attention_mass(query[n], key[n], Lifespans(alive.birth[n], alive.death[n])))


def test_shapes_alone():
    query, key = torch.empty(2, 4, 9, 8, device="meta"), torch.empty(2, 2, 12, 8, device="meta")
    birth = torch.empty(2, 1, 12, dtype=torch.int64, device="meta")
    alibi = alibi_score_mod(torch.empty(4, device="meta"))
    assert attention_mass(query, key, ages=[(0, 1)] * 3).shape == (3, 2, 2, 12)
    assert attention_mass(query, key, Lifespans(birth, birth), score_mod=alibi).shape == (2, 2, 12)
    assert attention_mass(torch.empty(0, 4, 9, 8), torch.empty(0, 2, 12, 8)).shape == (0, 2, 12)


QUERY, KEY = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
WRONG = [
    ({"reduction": "mean"}, ValueError, "reduction: expected one of 'sum', 'max', got 'mean'"),
    ({"ages": (0, 4)}, TypeError, r"ages: expected a list of \(low, high\), got \(0, 4\)"),
    ({"ages": 128}, TypeError, r"ages: expected a list of \(low, high\), got int"),
    ({"ages": []}, ValueError, r"ages: expected at least one \(low, high\), got none; None counts all ages"),
    ({"ages": [(-1, 4)]}, ValueError, "ages: low: expected at least 0, got -1"),
    ({"ages": [(4, 4)]}, ValueError, "ages: high: expected at least 5, got 4"),
    ({"lowering": "flash"}, ValueError, "lowering: expected one of"),
    ({"query": QUERY.expand(1, 2, 4, 8)[..., :7]}, ValueError, r"key: expected \[1, Hkv, K, 7\], got \[1, 2, 4, 8\]"),
    ({"query": torch.zeros(1, 2, 5, 8)}, ValueError, "query: expected at most K = 4 queries"),
    ({"bias": torch.zeros(1, 2, 5)}, ValueError, r"bias: expected \[1, 2, 4\], got \[1, 2, 5\]"),
    ({"lifespans": torch.zeros(1)}, TypeError, r"lifespans: expected Lifespans\(birth, death\), got Tensor"),
    ({"kernel_options": {}}, ValueError, "kernel_options: expected None for lowering='gather'"),
    ({"lowering": "flex"}, ValueError, "lowering: 'flex' has no log-sum-exp on a CPU; expected 'gather', 'dense' or None"),
    ({"lowering": "flex", "reduction": "max"}, ValueError, "lowering: 'flex' sums over queries; expected 'gather', 'dense'"),
    ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_names_the_argument(wrong, error, message):
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY} | wrong
    with pytest.raises(error, match=message):
        attention_mass(**arguments)
