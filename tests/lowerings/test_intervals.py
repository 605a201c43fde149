"""Several intervals per key, each with its own bias, in every lowering: a key is one term of the softmax for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.testing import assert_close

from flexdma import Lifespans, attention_mass, lifespan_attention
from flexdma.lifespans.terms import as_intervals, as_terms, bias_of_terms
from flexdma.reference import dense_attention_mass, dense_lifespan_attention
from flexdma.score_mods import alibi_score_mod
from tests.comparison import inputs, with_gradients
from tests.lowerings.test_attention_mass import flex as flex_mass
from tests.lowerings.test_lifespan_attention import any_lifespans
from tests.lowerings.uncompiled_flex import lifespans_with_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def disjoint(count, shape, *, seed):
    """Random disjoint intervals of each key; some empty, some that touch, some beyond the first or the last position."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(-3, shape[-1] + 3, (*shape, 2 * count), generator=generator).sort(-1).values
    return tuple(Lifespans(bounds[..., 2 * p], bounds[..., 2 * p + 1]) for p in range(count))


def case(sizes, count, *, lifespan_heads=None, seed=0):
    """query, key, value and a bias with ties for each of `count` intervals; and the intervals."""
    tensors = inputs(*sizes, seed=seed)
    biases = [inputs(*sizes, gate_heads=1 if p % 2 else None, seed=seed + p)[3] for p in range(count)]
    return [*tensors[:3], *biases], disjoint(count, (sizes[0], lifespan_heads or sizes[2], sizes[4]), seed=seed)


def called(function, intervals, **options):
    """A function of query, key, value and one bias for each interval."""

    def call(query, key, value, *biases):
        return function(query, key, value, intervals, bias=biases or None, **options)

    return call


def same(got, want, tolerance=1e-9):
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_literal():
    """Equal scores; key 0 has bias 0 in its first interval, log 3 in its second, and key 1 has log 2 in both of its own."""
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    value = torch.tensor([[[[1.0, 0], [0, 1], [0, 0], [0, 0]]]])
    first = Lifespans(torch.tensor([[[0, 1, 2, 3]]]), torch.tensor([[[2, 2, 3, 3]]]))
    second = Lifespans(torch.tensor([[[3, 2, 9, 0]]]), torch.tensor([[[4, 4, 9, 0]]]))
    biases = [torch.tensor([[[0.0, 2, 1, 1]]]).log().clamp(min=0), torch.tensor([[[3.0, 2, 1, 1]]]).log()]
    want = torch.tensor([[[[1.0, 0], [1 / 3, 2 / 3], [0, 2 / 3], [3 / 5, 2 / 5]]]])
    for function in (lifespan_attention, dense_lifespan_attention):
        assert_close(function(query, key, value, (first, second), bias=biases), want)
    mass = attention_mass(query, key, (first, second), bias=biases)
    assert_close(mass, torch.tensor([[[1 + 1 / 3 + 3 / 5, 2 / 3 + 2 / 3 + 2 / 5, 1 / 3, 0]]]))


def test_terms_and_intervals_are_inverse():
    tensors, intervals = case((2, 2, 2, 5, 7, 4), 3)
    terms, bias = as_terms(intervals, 7), bias_of_terms(tensors[3:])
    assert terms.birth.shape == (2, 2, 21)
    lifespans, biases = as_intervals(terms, bias, tensors[1])
    for p in range(3):
        same(lifespans[p], [bound.clamp(0, 7).int() for bound in intervals[p]])
        same([biases[p]], [tensors[3 + p].expand(2, 2, 7)])


LOWERINGS: dict[str, Callable] = {
    "gather": partial(lifespan_attention, lowering="gather", block_size=8),
    "dense": partial(lifespan_attention, lowering="dense"),
    "flex": lifespans_with_gradients,
}
CASES: dict[str, dict[str, Any]] = {
    "two, few queries": {"sizes": (2, 4, 2, 20, 40, 8), "count": 2},
    "three, shared by heads, several periods": {"sizes": (1, 2, 2, 100, 110, 8), "count": 3, "lifespan_heads": 1},
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification_with_all_gradients(name, lowering):
    tensors, intervals = case(**CASES[name])
    if "periods" in name:  # short ones, so that few are seen at once
        intervals = tuple(Lifespans(birth, torch.minimum(death, birth + 9)) for birth, death in intervals)
    # flex subtracts biases in float32; the rest is in float64.
    tolerance = 1e-5 if lowering == "flex" else 1e-9
    mods = [alibi_score_mod(torch.rand(tensors[0].shape[1])), *([] if lowering == "flex" else [None])]
    for score_mod in mods:
        got = with_gradients(called(LOWERINGS[lowering], intervals, score_mod=score_mod), tensors)
        same(got, with_gradients(called(dense_lifespan_attention, intervals, score_mod=score_mod), tensors), tolerance)


@given(
    st.integers(1, 25), st.integers(0, 10), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=20)
def test_gather_for_any_sizes(queries, more, count, block, group, differ, seed):
    """Fused, fused with gradients, and in plain operations, which D other than Dv takes."""
    sizes = (1, 2 * group, 2, queries, queries + more, 4, 6 if differ else 4)
    tensors, intervals = case(sizes, count, seed=seed)
    want = with_gradients(called(dense_lifespan_attention, intervals), tensors)
    same(with_gradients(called(lifespan_attention, intervals, block_size=block), tensors), want)
    with torch.no_grad():
        same([called(lifespan_attention, intervals, block_size=block)(*tensors)], want[:1])


def test_biases_for_all_for_some_and_for_none():
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    query, key, value, first, second = tensors
    for bias in (None, first, [None, None], [None, second.float()], [first, None], [first.bfloat16(), second]):
        for name, lowering in LOWERINGS.items():
            if name == "flex" and bias is not None:
                continue  # which gets all biases as one tensor, as the others do
            got = lowering(query, key, value, intervals, bias=bias)
            same([got], [dense_lifespan_attention(query, key, value, intervals, bias=bias)], 1e-5)


def test_one_interval_in_a_sequence_is_one_interval():
    tensors, _ = case((1, 4, 2, 30, 30, 8), 1)
    alive = any_lifespans(1, 2, 30, longest=9, seed=0)
    query, key, value, bias = tensors
    want = lifespan_attention(query, key, value, alive, bias=bias)
    assert torch.equal(lifespan_attention(query, key, value, [alive], bias=[bias]), want)


def test_intervals_that_overlap_are_two_terms():
    """The same interval twice doubles the weight of a key, as a bias of log 2 does."""
    (query, key, value, _), _ = case((1, 4, 2, 20, 30, 8), 1)
    alive = any_lifespans(1, 2, 30, longest=20, seed=0)
    twice = tuple(
        Lifespans(alive.birth, torch.where(torch.arange(30) < 15, end, 0)) for end in (alive.death, alive.death)
    )
    doubled = (
        torch.where(torch.arange(30) < 15, 2.0, -torch.inf).double().log().nan_to_num(nan=-torch.inf).expand(1, 2, 30)
    )
    want = lifespan_attention(query, key, value, alive, bias=doubled)
    for lowering in LOWERINGS.values():
        same([lowering(query, key, value, twice)], [want], 1e-5)


def test_a_mask_of_flash_mask():
    """FlashMask's causal form with two rows per key (arXiv 2410.01359): rows r0 <= i < r1 do not see the key."""
    query, key, value, _ = inputs(1, 4, 2, 40, 40, 8)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 41, (1, 2, 40, 2), generator=generator).sort(-1).values
    own = torch.arange(40).expand(1, 2, 40)
    before, after = (torch.maximum(rows[..., side], own) for side in (0, 1))
    i = torch.arange(40)[:, None]
    mask = (own[..., None, :] <= i) & ((i < rows[..., None, :, 0]) | (i >= rows[..., None, :, 1]))
    mask = mask.repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    want = want.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    two = (Lifespans(own, before), Lifespans(after, torch.full_like(own, 40)))
    for name, lowering in LOWERINGS.items():
        same([lowering(query, key, value, two)], [want], 1e-6 if name == "flex" else 1e-9)


def test_a_nan_in_a_key_that_no_interval_shows_stays_there():
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    for birth, death in intervals:
        death[..., 7] = birth[..., 7]
    tensors[1][:, :, 7], tensors[2][:, :, 7] = torch.nan, torch.inf
    want = with_gradients(called(dense_lifespan_attention, intervals), tensors)
    assert not any(each.isnan().any() for each in want)
    for score_mod in (None, lambda score, *_: score):
        same(with_gradients(called(lifespan_attention, intervals, score_mod=score_mod), tensors), want)


def test_learned_sinks():
    """The reference that scores are relative to is the best bias among all intervals that a query sees."""
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    tensors = [*tensors, torch.randn(4, dtype=torch.float64)]

    def attend(function, query, key, value, first, second, sinks):
        return function(query, key, value, intervals, bias=[first, second], sink_logits=sinks)

    want = with_gradients(partial(attend, dense_lifespan_attention), tensors)
    for name, lowering in LOWERINGS.items():
        same(with_gradients(partial(attend, lowering), tensors), want, 1e-5 if name == "flex" else 1e-9)


def test_a_bias_that_grows_costs_no_precision():
    """Float64 biases of a million and more, in float32 attention; softmaxes are relative to the best visible bias."""
    (query, key, value, *_), intervals = case((1, 2, 2, 40, 40, 8), 2)
    tensors = [each.float() for each in (query, key, value)]
    growing = 1e6 + torch.arange(40, dtype=torch.float64).expand(1, 1, 40) / 7

    def attend(function, query, key, value):
        return function(query, key, value, intervals, bias=[growing, growing - 1])

    got = attend(lifespan_attention, *tensors)
    want = attend(dense_lifespan_attention, *(each.double() for each in tensors))
    assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_compiled_once_for_all_lengths_with_all_gradients():
    """A static graph, then one for all lengths; training is an operator that reads births, so it needs no capacity."""
    counter = CompileCounterWithBackend("eager")

    def attend(query, key, value, first, second, *bounds):
        intervals = (Lifespans(*bounds[:2]), Lifespans(*bounds[2:]))
        return lifespan_attention(query, key, value, intervals, bias=[first, second])

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (20, 30, 33, 47):
        tensors, (first, second) = case((1, 4, 2, length, length, 8), 2, seed=length)

        def step(*leaves, bounds=(*first, *second)):
            return compiled(*leaves, *bounds)

        same(with_gradients(step, tensors), with_gradients(called(lifespan_attention, (first, second)), tensors))
    assert counter.frame_count == 2


def test_compiled_plain_operations_and_inference():
    """With a score_mod the timeline is traced; without gradients the call is one operator."""
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    alibi = alibi_score_mod(torch.rand(4))
    call = called(lifespan_attention, intervals, score_mod=alibi, capacity=60)
    got = with_gradients(torch.compile(call, fullgraph=True, backend="eager"), tensors)
    same(got, with_gradients(called(dense_lifespan_attention, intervals, score_mod=alibi), tensors))
    with torch.no_grad():
        got = torch.compile(called(lifespan_attention, intervals), fullgraph=True, backend="eager")(*tensors)
    same([got], [called(dense_lifespan_attention, intervals)(*tensors)])


@pytest.mark.slow
def test_exported_at_any_length():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, first, second, end):
            birth = torch.arange(key.shape[2], device=key.device).expand(1, 1, -1)
            intervals = (Lifespans(birth, birth + 4), Lifespans(birth + 7, end.expand_as(birth)))
            return lifespan_attention(query, key, value, intervals, bias=[first, second], capacity=128)

    def tensors(length):
        return (*case((1, 4, 2, length, length, 8), 2, seed=length)[0], torch.tensor([[[64]]]))

    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, {2: length}, {2: length}, {2: length}, {2: length}, None)
    program = torch.export.export(Attention(), tensors(40), dynamic_shapes=shapes).module()
    for each in (40, 17):
        same([program(*tensors(each))], [Attention()(*tensors(each))])


@pytest.mark.slow
def test_compiled_by_inductor():
    """The C++ kernel of FlexAttention, and training by gather with a score_mod."""
    tensors, intervals = case((1, 4, 2, 200, 300, 16), 2)
    tensors = [each.float() for each in tensors]
    exact = [each.double() for each in tensors]
    alibi = alibi_score_mod(torch.rand(4))
    want = with_gradients(called(dense_lifespan_attention, intervals, score_mod=alibi), exact)
    with torch.no_grad():
        inferred = called(lifespan_attention, intervals, score_mod=alibi, lowering="flex")(*tensors)
    assert_close(inferred.double(), want[0], rtol=1e-4, atol=1e-4)
    compiled = torch.compile(called(lifespan_attention, intervals, score_mod=alibi), fullgraph=True)
    same([each.double() for each in with_gradients(compiled, tensors)], want, 1e-4)


def test_inside_torch_func():
    tensors, intervals = case((1, 2, 1, 12, 15, 4), 2)

    def loss(function):
        return lambda *each: called(function, intervals)(*each).square().sum()

    numbers = tuple(range(len(tensors)))
    same(grad(loss(lifespan_attention), numbers)(*tensors), grad(loss(dense_lifespan_attention), numbers)(*tensors))
    pairs = [torch.stack([each, 2 * each]) for each in tensors]
    per_sample = vmap(grad(loss(lifespan_attention), numbers))(*pairs)
    second = grad(loss(dense_lifespan_attention), numbers)(*(each[1] for each in pairs))
    same([each[1] for each in per_sample], second)


def test_gradients_of_gradients():
    tensors, intervals = case((1, 1, 1, 3, 4, 2), 2)
    assert torch.autograd.gradgradcheck(called(lifespan_attention, intervals), [t.requires_grad_() for t in tensors])


def test_under_autocast_it_is_the_call_on_cast_inputs():
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    query, key, value, *biases = (each.float() for each in tensors)
    want = lifespan_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), intervals, bias=biases)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lifespan_attention(query, key, value, intervals, bias=biases), want)


def test_shapes_alone():
    tensors, intervals = case((1, 4, 2, 20, 30, 8), 2)
    query, key, value, *biases = (each.to("meta") for each in tensors)
    moved = [Lifespans(*(bound.to("meta") for bound in each)) for each in intervals]
    for lowering in (None, "flex", "dense"):
        output = lifespan_attention(query.float(), key.float(), value.float(), moved, bias=biases, lowering=lowering)
        assert output.shape == query.shape
    assert attention_mass(query, key, moved, bias=biases, ages=[(0, 2), (2, None)]).shape == (2, 1, 2, 30)


@given(
    st.integers(1, 25), st.integers(0, 10), st.integers(1, 3), st.sampled_from(["sum", "max"]),
    st.sampled_from([None, [(0, 3), (3, None)], [(2, 30), (5, 6)]]), st.sampled_from([1, 7, None]), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=20)
def test_mass_is_the_sum_over_the_intervals_of_a_key(queries, more, count, reduction, ages, block, seed):
    (query, key, _, *biases), intervals = case((1, 4, 2, queries, queries + more, 4), count, seed=seed)
    options: dict[str, Any] = {"reduction": reduction, "ages": ages, "bias": biases}
    want = dense_attention_mass(query, key, intervals, **options)
    same([attention_mass(query, key, intervals, block_size=block, **options)], [want])
    # The specification, by the attention of each key's value: 1 for the key, 0 for all others.
    if reduction == "sum" and ages is None:
        ones = torch.eye(queries + more, dtype=torch.float64).expand(1, 2, -1, -1)
        given = dense_lifespan_attention(query, key, ones, intervals, bias=biases)
        same([want], [given.unflatten(1, (2, 2)).sum((2, 3))])


def test_mass_by_transposed_attention_and_by_traced_blocks():
    (query, key, _, *biases), intervals = case((1, 4, 2, 16, 20, 8), 2)
    options: dict[str, Any] = {"ages": [(0, 9), (9, None)], "bias": biases}
    for score_mod in (None, alibi_score_mod(torch.rand(4))):
        want = dense_attention_mass(query, key, intervals, score_mod=score_mod, **options)
        same([flex_mass(query, key, intervals, score_mod=score_mod, **options)], [want], 1e-5)
    traced = torch.compile(partial(attention_mass, score_mod=score_mod, **options), fullgraph=True, backend="eager")
    same([traced(query, key, intervals)], [want])


TENSORS = [each.float() for each in inputs(1, 2, 2, 4, 4, 8)[:3]]
BIRTH = torch.zeros(1, 2, 4, dtype=torch.int32)
PAIR = (Lifespans(BIRTH, BIRTH + 2), Lifespans(BIRTH + 2, BIRTH + 4))
WRONG = [
    ({"lifespans": ()}, ValueError, r"lifespans: expected at least one Lifespans\(birth, death\), got none"),
    ({"lifespans": (PAIR[0], None)}, TypeError, r"lifespans\[1\]: expected Lifespans\(birth, death\), got NoneType"),
    (
        {"lifespans": (PAIR[0], Lifespans(BIRTH, BIRTH[..., :3]))}, ValueError,
        r"lifespans\[1\].death: expected \[1, 2, 4\], got \[1, 2, 3\]",
    ),
    ({"bias": [torch.zeros(1, 2, 4)]}, ValueError, "bias: expected one for each of 2 intervals, got 1"),
    ({"bias": [None, torch.zeros(1, 3, 4)]}, ValueError, r"bias\[1\]: expected \[1, 2, 4\], got \[1, 3, 4\]"),
    ({"bias": [None, BIRTH]}, TypeError, r"bias\[1\]: expected a floating point dtype, got torch.int32"),
    ({"lifespans": PAIR[0], "bias": [torch.zeros(1, 2, 4)]}, TypeError, r"bias: expected a tensor \[1, 2, 4\], got list"),
    ({"in_order": True}, ValueError, "in_order: expected None or False with 2 intervals per key, got True"),
    ({"capacity": 3}, ValueError, "capacity: expected at least 4, the most keys that one query sees, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_names_the_argument(wrong, error, message):
    arguments: dict[str, Any] = {"lifespans": PAIR} | wrong
    with pytest.raises(error, match=message):
        lifespan_attention(*TENSORS, **arguments)
