"""Masks made the slow way, in Python loops over queries and keys; and attention under a dense mask."""

import math

import torch
from hypothesis import strategies as st

from flexdma import Lifespans


def union(lifespans) -> torch.Tensor:
    """[B, H, K, K] bool: whether query i (second to last) sees key j in one of the Lifespans, which must be disjoint."""
    total = torch.zeros((), dtype=torch.int64)
    for birth, death in [lifespans] if isinstance(lifespans, Lifespans) else lifespans:
        assert birth.dtype == death.dtype == torch.int32
        assert birth.is_contiguous()
        assert death.is_contiguous()
        i = torch.arange(birth.shape[-1])[:, None]
        total = total + ((i >= birth.unsqueeze(-2)) & (i < death.unsqueeze(-2)))
    assert total.max() <= 1
    return total.bool()


class Row:
    """Padding and documents of one row of keys."""

    def __init__(self, length, key_padding_mask=None, document_ids=None, row=0):
        self.length = length
        self.real = [True] * length if key_padding_mask is None else key_padding_mask[row].tolist()
        ids = [0] * length if document_ids is None else document_ids[row].tolist()
        self.start = [0] * length
        for i in range(1, length):
            self.start[i] = self.start[i - 1] if ids[i] == ids[i - 1] else i

    def mask(self, sees):
        """[K][K]: whether i sees j, by a function of (i, j) for real keys j <= i of i's document."""
        return [
            [self.start[i] <= j <= i and self.real[j] and bool(sees(i, j)) for j in range(self.length)]
            for i in range(self.length)
        ]


def rank(score, position):
    """For max and sorted: larger first, NaN largest, of equal scores the newer."""
    return (math.isnan(score), 0.0 if math.isnan(score) else score, position)


def dense_attention(query, key, value, mask, bias=None):
    """[B, Hq, K, Dv] float64 under mask [B, H, K, K] and bias [B, H, K]; 0 for a query that sees nothing."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]

    def each(tensor):
        return tensor.expand(-1, key.shape[1], *tensor.shape[2:]).repeat_interleave(group, 1)

    score = query @ each(key).mT / query.shape[-1] ** 0.5
    if bias is not None:
        score = score + each(bias.double())[:, :, None]
    weight = score.masked_fill(~each(mask), -torch.inf).softmax(-1).nan_to_num(0.0)
    return weight @ each(value)


@st.composite
def rows(draw, length):
    """key_padding_mask and document_ids of one row, or None."""
    options = {}
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.tensor([draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    if draw(st.booleans()):
        ids = sorted(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
        options["document_ids"] = torch.tensor([ids]) % 3  # an id may return, and then begins a new document
    return options


@st.composite
def numbers(draw, values, max_length=14):
    """[1, 1 or 2, K] float32 of these values, and the options of `rows`."""
    heads, length = draw(st.integers(1, 2)), draw(st.integers(1, max_length))
    drawn = draw(st.lists(values, min_size=heads * length, max_size=heads * length))
    return torch.tensor(drawn, dtype=torch.float32).view(1, heads, length), draw(rows(length))
