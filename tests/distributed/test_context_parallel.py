"""Attention over a sequence that is divided over ranks equals attention over it in one process."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from flexdma import dynamic_mask_attention
from flexdma.distributed import context_parallel_dynamic_mask_attention, shard_positions
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import inputs, with_gradients
from tests.distributed.processes import mesh_of
from tests.distributed.received_bytes import ReceivedBytes

WORLD = 4
NAMES = ("output", "query", "key", "value", "gate")


def shard(tensor: Tensor, lengths: list[int], rank: int, dim: int = 2) -> Tensor:
    return tensor.split(lengths, dim)[rank]


def of_rank(options, lengths, rank):
    parts = {name: options[name] for name in ("key_padding_mask", "document_ids") if name in options}
    return options | {name: shard(value, lengths, rank, 1) for name, value in parts.items()}


def attend_to_shards(tensors, lengths, options, mesh=None):
    """On one rank: the output for its part, and the gradients of its tensors; None on ranks outside the mesh."""
    mesh = mesh_of(len(lengths)) if mesh is None else mesh
    if mesh.get_coordinate() is None:
        return None
    rank = mesh.get_local_rank()
    leaves = [shard(tensor, lengths, rank).clone().requires_grad_() for tensor in tensors]
    output = context_parallel_dynamic_mask_attention(*leaves, mesh=mesh, **of_rank(options, lengths, rank))
    shape = (*output.shape[:2], sum(lengths), output.shape[3])
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, shard(cotangent, lengths, rank).to(output.dtype))
    return [output.detach(), *gradients]


def over_ranks(ranks, tensors, lengths, options):
    """Output and gradients of the whole sequence."""
    answers = ranks.run(attend_to_shards, tensors, lengths, options)
    return [torch.cat(parts, 2) for parts in zip(*answers[: len(lengths)], strict=True)]


def errors(got, exact):
    """Name -> the largest error, relative to the largest number."""
    return {
        name: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for name, a, b in zip(NAMES, got, exact, strict=True)
    }


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=2, max_size=WORLD))
    batch, heads, length = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), sum(lengths)
    size = st.integers(1, 12)
    options = {
        "window_size": draw(st.one_of(size, st.lists(size, min_size=heads, max_size=heads))),
        "selection": draw(st.sampled_from(["causal", "threshold"])),
        "sinks": draw(st.integers(0, 3)),
        "recent": draw(st.integers(0, 9)),
    }
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, length, generator=generator) > 0.3
    if draw(st.booleans()):
        options["document_ids"] = (torch.rand(batch, length, generator=generator) > 0.9).cumsum(-1) % 3
    query, key, value, gate = inputs(batch, 2 * heads, heads, length, length, 4, 3, seed=seed)
    gate[torch.rand(gate.shape, generator=generator) > 0.9] = -torch.inf
    return [query, key, value, gate], lengths, options


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_ranks_compute_what_one_process_computes(four, case):
    tensors, lengths, options = case
    got = over_ranks(four, tensors, lengths, options)
    exact = with_gradients(dense_dynamic_mask_attention, tensors, **options)
    assert max(errors(got, exact).values()) < 1e-12, (lengths, options)


def nearer(score, b, h, i, j):
    return score - 0.01 * (h + 1) * (i - j)


@pytest.mark.parametrize(
    "options",
    [
        {"score_mod": nearer, "scale": 0.3, "recent": 2},
        {"sink_logits": torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)},
        {"lowering": "dense"},
    ],
    ids=list,
)
def test_other_options_are_those_of_one_process(four, options):
    options = {"window_size": 5, **options}
    tensors, lengths = inputs(2, 4, 2, 50, 50, 8), [17, 3, 29, 1]
    got = over_ranks(four, tensors, lengths, options)
    options.pop("lowering", None)
    exact = with_gradients(dense_dynamic_mask_attention, tensors, **options)
    assert max(errors(got, exact).values()) < 1e-12


def test_gates_that_all_heads_share_get_their_gradient(four):
    tensors, lengths = inputs(1, 4, 2, 40, 40, 8, gate_heads=1), [10, 10, 10, 10]
    got = over_ranks(four, tensors, lengths, {"window_size": 5})
    assert max(errors(got, with_gradients(dense_dynamic_mask_attention, tensors, window_size=5)).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_one_process_in_the_same_dtype(four, dtype):
    tensors, lengths = inputs(2, 4, 2, 200, 200, 16, dtype=dtype), [50, 60, 40, 50]
    options = {"window_size": 16, "sinks": 2, "recent": 4}
    exact = with_gradients(dense_dynamic_mask_attention, [tensor.double() for tensor in tensors], **options)
    got = errors(over_ranks(four, tensors, lengths, options), exact)
    plain = errors(with_gradients(dynamic_mask_attention, tensors, **options), exact)
    once_more = torch.finfo(dtype).eps  # sums of ranks are rounded once more
    assert all(got[name] <= 2 * plain[name] + once_more for name in NAMES), (got, plain)


def test_a_nan_reaches_the_queries_that_it_reaches_in_one_process(four):
    tensors, lengths = inputs(1, 2, 1, 40, 40, 4), [10, 10, 10, 10]
    tensors[3][..., 13] = torch.nan
    document_ids = (torch.arange(40) >= 25).long()[None]
    options = {"window_size": 3, "document_ids": document_ids}
    output = over_ranks(four, tensors, lengths, options)[0]
    wanted = torch.zeros(40, dtype=torch.bool)
    wanted[13:25] = True
    assert torch.equal(output.isnan().all(-1)[0, 0], wanted)


def attend_in_a_larger_mesh(tensors, lengths, options):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    row = mesh["dp"].get_local_rank()
    return attend_to_shards([tensor[row : row + 1] for tensor in tensors], lengths, options, mesh["cp"])


def test_one_dimension_of_a_mesh_has_the_sequence(four):
    tensors, lengths = inputs(2, 4, 2, 30, 30, 8), [20, 10]
    answers = four.run(attend_in_a_larger_mesh, tensors, lengths, {"window_size": 6})
    rows = [[torch.cat(parts, 2) for parts in zip(*answers[row : row + 2], strict=True)] for row in (0, 2)]
    got = [torch.cat(pair) for pair in zip(*rows, strict=True)]
    exact = with_gradients(dense_dynamic_mask_attention, tensors, window_size=6)
    assert (got[0] - exact[0]).abs().max() < 1e-12


def penalty_of_shards(tensors, lengths, options):
    """Gradients of the sum of squared gradients."""
    rank = mesh_of(WORLD).get_local_rank()
    leaves = [shard(tensor, lengths, rank).clone().requires_grad_() for tensor in tensors]
    output = context_parallel_dynamic_mask_attention(*leaves, mesh=mesh_of(WORLD), **options)
    return torch.autograd.grad(penalty(output, leaves), leaves)


def penalty(output, leaves):
    gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)


def test_gradients_of_gradients_are_those_of_one_process(four):
    tensors, lengths = inputs(1, 2, 1, 20, 20, 4), [5, 6, 2, 7]
    answers = four.run(penalty_of_shards, tensors, lengths, {"window_size": 4})
    got = [torch.cat(parts, 2) for parts in zip(*answers, strict=True)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    exact = torch.autograd.grad(penalty(dense_dynamic_mask_attention(*leaves, window_size=4), leaves), leaves)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b)


def without_gradients_then_with(tensors, lengths, options):
    with torch.inference_mode():
        attend = context_parallel_dynamic_mask_attention(
            *(shard(tensor, lengths, mesh_of(WORLD).get_local_rank()) for tensor in tensors),
            mesh=mesh_of(WORLD),
            **options,
        )
    return attend.clone(), attend_to_shards(tensors, lengths, options)[0]


def test_inference_mode_leaves_later_calls_alone(four):
    tensors, lengths = inputs(1, 2, 1, 20, 20, 4), [5, 6, 2, 7]
    for before, after in four.run(without_gradients_then_with, tensors, lengths, {"window_size": 4}):
        assert torch.equal(before, after)


def positions(tokens):
    rank = mesh_of(WORLD).get_local_rank()
    return shard_positions(tokens[rank], mesh_of(WORLD))


def test_positions_count_the_tokens_of_earlier_ranks(four):
    assert torch.equal(torch.cat(four.run(positions, [3, 0, 5, 2])), torch.arange(10))


def decode_after(tensors, lengths, options):
    """The output of one more token, from the state that the last rank returns."""
    mesh = mesh_of(WORLD)
    rank = mesh.get_local_rank()
    parts = [shard(tensor, [*lengths, 1], rank) for tensor in tensors]
    _, state = context_parallel_dynamic_mask_attention(*parts, mesh=mesh, return_state=True, **options)
    if rank < WORLD - 1:
        return state.length
    return dynamic_mask_attention(*(tensor[:, :, -1:] for tensor in tensors), state=state, **options)


@torch.no_grad()
def test_the_state_of_the_last_rank_goes_on(four):
    tensors, lengths = inputs(2, 4, 2, 41, 41, 8), [10, 12, 8, 10]
    options: dict[str, Any] = {"window_size": 6, "sinks": 2, "recent": 3}
    *before, token = four.run(decode_after, tensors, lengths, options)
    assert [length.tolist() for length in before] == [[10, 10], [22, 22], [30, 30]]
    exact = dense_dynamic_mask_attention(*tensors, **options)
    torch.testing.assert_close(token, exact[:, :, -1:])


def bytes_received(length, options, gradients):
    mesh = mesh_of(WORLD)
    tensors = [tensor.requires_grad_(gradients) for tensor in inputs(1, 4, 2, length, length, 8, dtype=torch.float32)]
    with ReceivedBytes() as received:
        output = context_parallel_dynamic_mask_attention(*tensors, mesh=mesh, **options)
        if gradients:
            output.sum().backward()
    return received.count


@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_rank_receives_does_not_depend_on_the_length(four, gradients):
    options = {"window_size": 8, "sinks": 1, "recent": 3}
    short, long = (four.run(bytes_received, length, options, gradients) for length in (5, 300))
    assert short == long
    slots = 2 * 12  # Hkv (w + sinks + recent)
    forward, backward = slots * (4 * (8 + 8) + 4 + 8), slots * (4 * (8 + 8) + 4)  # key, value, gate; position
    # Each rank receives a message from the rank before it and from the second before, and as many gradients come back.
    for received, (messages, returned) in zip(long, [(0, 2), (1, 2), (2, 1), (2, 0)], strict=True):
        expected = messages * forward + (returned * backward if gradients else 0)
        assert expected < received < expected + 600  # lengths and the like, and the options that are compared
