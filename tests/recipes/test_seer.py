"""SeerAttention: the gate, its mask, and its loss, against the whole attention matrix and loops over blocks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexdma.block_masks import SeerGate, seer_block_mask, seer_loss, seer_target
from tests.recipes.dense import check_attention, check_mask, heads, uncompiled

LENGTH, BLOCK = 27, 8


def gate(seed=0, **options):
    torch.manual_seed(seed)
    return SeerGate(4, 2, 8, gate_size=6, block_size=BLOCK, **options).double()


def blocks_of_tokens(length, block):
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def dense_scores(module, query, key):
    """The gate, one pair of blocks at a time."""
    members = blocks_of_tokens(query.shape[2], module.block_size)
    scores = torch.full((query.shape[0], 4, len(members), len(members)), float("-inf"), dtype=torch.float64)

    def rotated(vector, position):
        half = len(vector) // 2
        turns = [torch.tensor(position * 10000.0 ** (-i / half), dtype=torch.float64) for i in range(half)]
        pairs = torch.stack([torch.complex(vector[i], vector[i + half]) for i in range(half)])
        pairs = pairs * torch.polar(torch.ones(half, dtype=torch.float64), torch.stack(turns))
        return torch.cat([pairs.real, pairs.imag])

    for b in range(query.shape[0]):
        for h in range(4):
            for r, rows in enumerate(members):
                for c, columns in enumerate(members[: r + 1]):
                    keys = key[b, h // 2, columns]
                    pooled = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
                    left = query[b, h, rows].mean(0) @ module.query_proj[h]
                    right = pooled @ module.key_proj[h // 2]
                    if module.rope_theta is not None:
                        left, right = rotated(left, rows[0]), rotated(right, columns[0])
                    scores[b, h, r, c] = left @ right / 6**0.5
    return scores


@pytest.mark.parametrize("theta", [10000.0, None])
def test_the_gate(theta):
    query, key, _ = heads(2, 4, 2, LENGTH, LENGTH)
    module = gate(rope_theta=theta)
    torch.testing.assert_close(module(query, key), dense_scores(module, query, key))


def dense_target(query, key, block):
    """The attention matrix, its largest weight in each pair of blocks, and shares of each row."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    length = query.shape[2]
    scores = query @ key.mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    members = blocks_of_tokens(length, block)
    rows = [torch.stack([weights[:, :, r][..., c].amax((-1, -2)) for c in members], -1) for r in members]
    largest = torch.stack(rows, -2)
    return largest / largest.sum(-1, keepdim=True)


def test_the_target_is_the_pooled_attention():
    query, key, _ = heads(2, 4, 2, LENGTH, LENGTH)
    target = seer_target(query, key.requires_grad_(), block_size=BLOCK)
    torch.testing.assert_close(target, dense_target(query, key, BLOCK).detach(), atol=1e-12, rtol=1e-12)
    assert not target.requires_grad
    assert seer_target(query.bfloat16(), key.bfloat16(), block_size=BLOCK).dtype == torch.float32


class Sizes(TorchDispatchMode):
    """The numbers of elements of all results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def test_the_target_needs_no_square_matrix():
    """The largest tensor is one block of rows."""
    query, key = torch.randn(1, 1, 512, 4), torch.randn(1, 1, 512, 4)
    with Sizes() as sizes:
        seer_target(query, key)
    assert max(sizes.seen) == 64 * 512


def test_the_loss_and_its_gradient():
    query, key, _ = heads(1, 4, 2, LENGTH, LENGTH)
    module = gate()
    target = dense_target(query, key, BLOCK)
    gradients = []
    for scores, loss in (
        (module(query, key), lambda scores: seer_loss(scores, seer_target(query, key, block_size=BLOCK))),
        (dense_scores(module, query, key), lambda scores: slow_loss(scores, target)),
    ):
        value = loss(scores)
        gradients.append([value.detach(), *torch.autograd.grad(value, [module.query_proj, module.key_proj])])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
        assert want.abs().max() > 1e-4


def slow_loss(scores, target):
    rows = []
    for r in range(scores.shape[2]):
        seen = scores[:, :, r, : r + 1].exp()
        shares = seen / seen.sum(-1, keepdim=True)
        goal = target[:, :, r, : r + 1]
        rows.append((goal * (goal / shares).log()).sum(-1))
    return torch.stack(rows).mean()


def test_the_loss_is_zero_at_the_target_and_teaches_the_choice():
    query, key, _ = heads(1, 4, 2, 64, 64)
    target = seer_target(query, key, block_size=BLOCK)
    assert seer_loss(target.log(), target).abs() < 1e-12
    module = gate()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    before = seer_loss(module(query, key), target).item()
    for _ in range(30):
        optimizer.zero_grad()
        seer_loss(module(query, key), target).backward()
        optimizer.step()
    assert seer_loss(module(query, key), target).item() < 0.5 * before


def dense_choice(scores, *, top_k=None, threshold=None, own_block=True):
    """The chosen pairs of blocks, by loops."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        row = scores[b, h, r, : r + 1]
        order = sorted(range(r + 1), key=lambda c: (own_block and c == r, row[c].item(), c))
        picked = (
            order[-top_k:] if top_k else [c for c in order if row.softmax(0)[c] > threshold or (own_block and c == r)]
        )
        chosen[b, h, r, picked] = True
    return chosen


@uncompiled
@pytest.mark.parametrize("own_block", [True, False])
@pytest.mark.parametrize("rule", [{"top_k": 2}, {"threshold": 0.4}])
def test_the_mask(rule, own_block):
    query, key, value = heads(2, 4, 2, LENGTH, LENGTH)
    scores = gate()(query, key).detach()
    scores[0, 0] = scores[0, 0].round()  # ties
    block_mask = seer_block_mask(scores, length=LENGTH, block_size=BLOCK, own_block=own_block, **rule)
    chosen = dense_choice(scores, own_block=own_block, **rule)
    dense = chosen.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :LENGTH, :LENGTH].tril()
    check_mask(block_mask, dense)
    if not own_block and "threshold" in rule:  # rows without a key
        check_attention(block_mask, dense, query, key, value)


def test_a_gate_under_autocast_and_in_another_dtype():
    query, key, _ = heads(1, 4, 2, LENGTH, LENGTH)
    module = gate()
    with pytest.raises(TypeError, match=r"query: expected torch\.float64 as the gate has, got torch\.float32"):
        module(query.float(), key.float())
    want = module(query, key)
    module = module.float()
    with torch.autocast("cpu"):
        got = module(query.float(), key.float())
    torch.testing.assert_close(got.double(), want, atol=0.1, rtol=0.1)


def test_wrong_arguments_are_named():
    query, key, _ = heads(1, 4, 2, LENGTH, LENGTH)
    scores = torch.zeros(1, 4, 4, 4)
    for options, message in (
        ({"length": 27}, "top_k, threshold: expected one of the two, got None and None"),
        ({"length": 27, "top_k": 1, "threshold": 0.1}, "top_k, threshold: expected one of the two, got 1 and 0.1"),
        ({"length": 33, "top_k": 1}, r"scores: expected \[B, Hq, 5, 5\], got \[1, 4, 4, 4\]"),
        ({"length": 27, "top_k": 0}, "top_k: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            seer_block_mask(scores, block_size=8, **options)
    with pytest.raises(ValueError, match="query: expected 27 tokens as key has, got 5"):
        gate()(query[:, :, :5], key)
    with pytest.raises(ValueError, match=r"key: expected \[B, 2, N, 8\], got \[1, 4, 27, 8\]"):
        gate()(query, query)
    with pytest.raises(ValueError, match="gate_size: expected an even number with rope_theta, got 5"):
        SeerGate(4, 2, 8, gate_size=5)
    with pytest.raises(ValueError, match=r"target: expected \[1, 4, 4, 4\], got \[1, 4, 4, 3\]"):
        seer_loss(scores, scores[..., :3])
