"""SnapKV and H2O, which select by attention, equal the sentence of their paper, in Python loops over float64 weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdma.policies import h2o_lifespans, snapkv_lifespans
from tests.policies.slow_masks import Row, rank, rows, union

# A huge scale: all weights are 0 or 1, so that sums are exact and equal sums are frequent.
SCALES = st.sampled_from([None, 1e6])


def weights(query, key, scale):
    """A function of (query head, i, the keys that it sees) -> their weights."""
    logits = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT)[0]
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    return lambda head, i, seen: dict(zip(seen, logits[head, i, seen].softmax(-1).tolist(), strict=True))


def drawn(length, seed, heads=2, group=2):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, heads * group, length, 4, dtype=torch.float64, generator=generator)
    return query, key[:, :heads]


def best(score, candidates, budget):
    return sorted(candidates, key=lambda j: rank(score[j], j))[len(candidates) - min(budget, len(candidates)) :]


@settings(max_examples=25)
@given(
    st.integers(2, 12), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3, 5]),
    st.sampled_from(["avg", "max"]), SCALES, st.data(),
)  # fmt: skip
def test_snapkv_keeps_what_the_last_queries_attend_to(prompt, later, observed, more, size, pooling, scale, data):
    """When the prompt ends, the keys with the largest pooled attention from the last queries stay, and theirs."""
    length = prompt + later
    query, key = drawn(length, seed=data.draw(st.integers(0, 9)))
    options = {name: mask for name, mask in data.draw(rows(length)).items() if name == "key_padding_mask"}
    row, weight, first = Row(length, **options), weights(query, key, scale), prompt - observed
    capacity = [observed + more, observed + 1]
    want = []
    for head in range(2):
        kept = set(range(prompt))
        if prompt > capacity[head]:
            mass = [0.0] * prompt
            for i in (i for i in range(first, prompt) if row.real[i]):
                for h in (2 * head, 2 * head + 1):
                    for j, p in weight(h, i, [j for j in range(i + 1) if row.real[j]]).items():
                        mass[j] += p

            def pooled(j, mass=mass):
                near = [mass[t] for t in range(max(0, j - size // 2), min(first, j + size // 2 + 1))]
                return sum(near) / size if pooling == "avg" else max(near)

            candidates = [j for j in range(first) if row.real[j]]
            # Rounded: the order of a sum differs.
            score = {j: round(pooled(j), 12) for j in candidates}
            kept = {*best(score, candidates, capacity[head] - observed), *range(first, prompt)}
        want.append(row.mask(lambda i, j, kept=kept: i < prompt or j >= prompt or j in kept))
    start = data.draw(st.integers(0, max(first, 0)))  # of the given queries
    got = snapkv_lifespans(
        query[:, :, start:], key, capacity, prompt_length=prompt, observed=observed, kernel_size=size, pooling=pooling,
        scale=scale, **options,
    )  # fmt: skip
    assert union(got)[0].tolist() == want


def heavy_hitters(weight, heavy, recent, chunk, prompt, row, heads):
    """[K][K]: the cache of H2O for one KV head."""
    alive: list[int] = []
    mass: dict[int, float] = {}
    seen, begin = [], 0
    while begin < row.length:
        stop = min(begin + (chunk if begin or not prompt else prompt), row.length)
        alive = [j for j in alive if j >= row.start[begin]]
        if begin:
            older = [j for j in alive if j <= begin - recent]
            alive = [*best(mass, older, heavy), *(j for j in alive if j > begin - recent)]
        received: dict[int, float] = {}
        for i in range(begin, stop):
            own = [j for j in range(begin, i + 1) if row.real[j]]
            sees = [j for j in (*alive, *own) if j >= row.start[i]]
            seen.append([j in sees for j in range(row.length)])
            for h in heads if row.real[i] and sees else ():
                for j, p in weight(h, i, sees).items():
                    received[j] = received.get(j, 0.0) + p
        alive += [j for j in range(begin, stop) if row.real[j]]
        mass = {j: mass.get(j, 0.0) + received.get(j, 0.0) for j in alive}
        begin = stop
    return seen


@settings(max_examples=25)
@given(
    st.integers(1, 12), st.lists(st.integers(1, 3), min_size=2, max_size=2), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from([0, 0, 3, 20]), SCALES, st.booleans(), st.data(),
)  # fmt: skip
def test_h2o_evicts_the_smallest_accumulated_attention(length, heavy, recent, chunk, prompt, scale, with_nan, data):
    """Keys beyond the recent ones compete for the heavy hitters' places by the attention that they have received so far."""
    query, key = drawn(length, seed=data.draw(st.integers(0, 9)))
    if with_nan:
        query[:, :2, length // 2] = math.nan
    options = data.draw(rows(length))
    row, weight = Row(length, **options), weights(query, key, scale)
    got = h2o_lifespans(query, key, heavy, recent, chunk=chunk, prompt_length=prompt, scale=scale, **options)
    want = [heavy_hitters(weight, heavy[h], recent, chunk, prompt, row, (2 * h, 2 * h + 1)) for h in range(2)]
    assert union(got)[0].tolist() == want


@pytest.mark.parametrize("chunk", [1, 3])
def test_h2o_over_a_long_row_with_padding_and_documents(chunk):
    """Padded queries give no attention, and a chunk with two documents none across them."""
    length = 60
    query, key = drawn(length, seed=3)
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.7
    options: dict[str, Any] = {"key_padding_mask": mask, "document_ids": torch.arange(length)[None] // 20}
    row, weight = Row(length, **options), weights(query, key, 2.0)
    want = [heavy_hitters(weight, 3, 2, chunk, 0, row, (2 * h, 2 * h + 1)) for h in range(2)]
    assert union(h2o_lifespans(query, key, 3, 2, chunk=chunk, scale=2.0, **options))[0].tolist() == want


def test_h2o_bounds_what_a_query_sees():
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    for chunk in (1, 4):
        seen = union(h2o_lifespans(query, key, [3, 5], [4, 2], chunk=chunk)).sum(-1)
        assert seen.amax(-1).tolist() == [[7 + chunk - 1, 7 + chunk - 1]]


def test_a_budget_that_is_large_enough_is_causal_attention():
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    everything = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 2, 9, 9)
    assert torch.equal(union(h2o_lifespans(query, key, 5, 4)), everything)
    assert torch.equal(union(snapkv_lifespans(query, key, 9, observed=2)), everything)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: snapkv_lifespans(q, k, 2, observed=2), "capacity: expected at least 3, got 2"),
        (
            lambda q, k: snapkv_lifespans(q, k, 4, observed=2, prompt_length=9),
            "prompt_length: expected at most K = 8, got 9",
        ),
        (
            lambda q, k: snapkv_lifespans(q, k, 4, observed=2, kernel_size=4),
            "kernel_size: expected an odd number, got 4",
        ),
        (
            lambda q, k: snapkv_lifespans(q, k, 4, observed=2, pooling="sum"),
            "pooling: expected one of 'avg', 'max', got 'sum'",
        ),
        (lambda q, k: snapkv_lifespans(q[:, :, 7:], k, 4, observed=2), "query: expected the positions from 6 on"),
        (
            lambda q, k: snapkv_lifespans(q, k, [4, 4, 4], observed=2),
            "capacity: expected one int per key/value head = 2, got 3",
        ),
        (lambda q, k: h2o_lifespans(q[:, :, 1:], k, 2, 2), "query: expected all K = 8 positions, got 7"),
        (lambda q, k: h2o_lifespans(q, k, 2, 0), "recent: expected at least 1, got 0"),
        (lambda q, k: h2o_lifespans(q, k, [2], 2), "heavy: expected one int per key/value head = 2, got 1"),
        (
            lambda q, k: h2o_lifespans(q, k, 2, 2, key_padding_mask=torch.ones(1, 7).bool()),
            "key_padding_mask: expected",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 4, 8, 4), torch.randn(1, 2, 8, 4))
