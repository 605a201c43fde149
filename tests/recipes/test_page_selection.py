"""Quest, LServe and Double Sparsity against masks that loops over keys make, and full attention when all is picked."""

from typing import Any

import pytest
import torch

from flexdma.page_selection import (
    attend_to_pages,
    double_sparsity_attention,
    double_sparsity_channels,
    lserve_attention,
    page_bounds,
    quest_attention,
)
from tests.recipes.dense import dense_attention, heads

KEYS = 29
# A row without padding, one padded on the left, one on the right.
REAL = torch.stack([torch.arange(KEYS) >= 0, torch.arange(KEYS) >= 6, torch.arange(KEYS) < 22])


def token(real=REAL, kv_heads=2):
    """query, key, value; padded keys hold NaN."""
    query, key, value = heads(3, 4, kv_heads, 1, KEYS)
    hidden = ~real[:, None, :, None]
    return query, key.masked_fill(hidden, float("nan")), value.masked_fill(hidden, float("nan"))


def dense_pages(query, key, real, page_size, logical_size, num_pages):
    mask = torch.zeros(3, 4, 1, KEYS, dtype=torch.bool)
    group = query.shape[1] // key.shape[1]
    for b in range(3):
        newest = max(j for j in range(KEYS) if real[b, j]) // page_size
        for h in range(4):
            scores: dict[int, float] = {}
            for start in range(0, KEYS, logical_size):
                members = [key[b, h // group, j] for j in range(start, min(start + logical_size, KEYS)) if real[b, j]]
                if members:
                    bound = sum(max((q * k[d]).item() for k in members) for d, q in enumerate(query[b, h, 0]))
                    page = start // page_size
                    scores[page] = max(scores.get(page, float("-inf")), bound)
            best = sorted(scores, key=lambda page: (page == newest, scores[page]))[-num_pages:]
            for j in range(KEYS):
                mask[b, h, 0, j] = real[b, j] and j // page_size in best
    return mask


def attend_densely(query, key, value, mask):
    hidden = ~REAL[:, None, :, None]
    return dense_attention(query, key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0), mask)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_quest(kv_heads):
    query, key, value = token(kv_heads=kv_heads)
    for num_pages in (1, 3, 99):
        want = attend_densely(query, key, value, dense_pages(query, key, REAL, 4, 4, num_pages))
        bounds = page_bounds(key, 4, REAL)
        for kept in (None, bounds):
            got = quest_attention(
                query, key, value, num_pages=num_pages, page_size=4, bounds=kept, key_padding_mask=REAL
            )
            torch.testing.assert_close(got, want)


def test_lserve():
    query, key, value = token()
    for page_size, num_pages in ((8, 2), (8, 1), (4, 3), (2, 99)):
        want = attend_densely(query, key, value, dense_pages(query, key, REAL, page_size, 2, num_pages))
        options: dict[str, Any] = {
            "num_pages": num_pages,
            "page_size": page_size,
            "logical_size": 2,
            "key_padding_mask": REAL,
        }
        torch.testing.assert_close(lserve_attention(query, key, value, **options), want)


def test_a_bound_is_never_exceeded():
    query, key, _ = heads(3, 4, 2, 1, KEYS)
    bounds = page_bounds(key, 4).scores(query)
    products = (query @ key.repeat_interleave(2, 1).mT)[:, :, 0]
    for j in range(KEYS):
        assert (products[..., j] <= bounds[..., j // 4] + 1e-12).all()


def test_double_sparsity():
    query, key, value = token()
    sample = heads(2, 4, 2, 11, 11, seed=1)
    channels = double_sparsity_channels(sample[0], sample[1], 3)
    for h in range(4):
        weight = [(sample[0][:, h, :, d] * sample[1][:, h // 2, :, d]).abs().mean().item() for d in range(8)]
        assert channels[h].tolist() == sorted(range(8), key=weight.__getitem__, reverse=True)[:3]
    for num_keys in (1, 5, 99):
        mask = torch.zeros(3, 4, 1, KEYS, dtype=torch.bool)
        for b in range(3):
            for h in range(4):
                real = [j for j in range(KEYS) if REAL[b, j]]
                part = {j: sum(query[b, h, 0, d] * key[b, h // 2, j, d] for d in channels[h]).item() for j in real}
                mask[b, h, 0, sorted(part, key=part.__getitem__)[-num_keys:]] = True
        want = attend_densely(query, key, value, mask)
        options: dict[str, Any] = {"channels": channels, "num_keys": num_keys, "key_padding_mask": REAL}
        torch.testing.assert_close(double_sparsity_attention(query, key, value, **options), want)
        labels = torch.stack([key[:, h // 2][..., channels[h]] for h in range(4)], 1)
        torch.testing.assert_close(double_sparsity_attention(query, key, value, labels=labels, **options), want)


def test_everything_picked_is_full_attention_without_padding():
    query, key, value = heads(3, 4, 2, 1, KEYS)
    want = dense_attention(query, key, value, torch.ones(3, 4, 1, KEYS, dtype=torch.bool))
    channels = torch.zeros(4, 1, dtype=torch.int64)
    for got in (
        quest_attention(query, key, value, num_pages=8, page_size=4),
        lserve_attention(query, key, value, num_pages=4, page_size=8, logical_size=4),
        double_sparsity_attention(query, key, value, channels=channels, num_keys=KEYS),
    ):
        torch.testing.assert_close(got, want)


def test_no_real_key_gives_zero_and_reads_no_nan():
    query, key, value = token(real=torch.zeros_like(REAL))
    options: dict[str, Any] = {"key_padding_mask": torch.zeros_like(REAL)}
    assert quest_attention(query, key, value, num_pages=2, page_size=4, **options).abs().max() == 0
    channels = torch.zeros(4, 1, dtype=torch.int64)
    assert double_sparsity_attention(query, key, value, channels=channels, num_keys=2, **options).abs().max() == 0


def test_sixteen_bits_lose_what_a_plain_implementation_loses():
    query, key, value = (tensor.bfloat16() for tensor in heads(1, 4, 2, 1, KEYS))
    everything = torch.ones(1, 4, 1, KEYS, dtype=torch.bool)
    want = dense_attention(query.double(), key.double(), value.double(), everything)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    got = quest_attention(query, key, value, num_pages=8, page_size=4)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max()


def test_a_token_reads_its_pages_alone():
    query, key, value = heads(1, 4, 2, 1, KEYS)
    pages = torch.tensor([1, 7]).expand(1, 4, 2)
    got = attend_to_pages(query, key, value, pages, page_size=4)
    read = [4, 5, 6, 7, 28]
    everything = torch.ones(1, 4, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(got, dense_attention(query, key[:, :, read], value[:, :, read], everything))


def test_wrong_arguments_are_named():
    query, key, value = heads(1, 4, 2, 1, KEYS)
    with pytest.raises(ValueError, match=r"query: expected one token, \[B, Hq, 1, D\], got \[1, 4, 2, 8\]"):
        quest_attention(query.repeat(1, 1, 2, 1), key, value, num_pages=2)
    with pytest.raises(ValueError, match=r"bounds\.least: expected \[1, 2, 2, 8\], got \[1, 2, 8, 8\]"):
        quest_attention(query, key, value, num_pages=2, bounds=page_bounds(key, 4))
    with pytest.raises(ValueError, match="num_pages: expected at least 1, got 0"):
        quest_attention(query, key, value, num_pages=0)
    with pytest.raises(ValueError, match="page_size: expected a multiple of logical_size = 16, got 24"):
        lserve_attention(query, key, value, num_pages=2, page_size=24)
    with pytest.raises(ValueError, match=r"channels: expected \[4, r\], got \[2, 3\]"):
        double_sparsity_attention(query, key, value, channels=torch.zeros(2, 3, dtype=torch.int64), num_keys=2)
    with pytest.raises(ValueError, match="num_channels: expected at most D = 8, got 9"):
        double_sparsity_channels(query, key[:, :, :1], 9)
