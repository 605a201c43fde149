"""The state after two runs of tokens that were read apart."""

from functools import reduce
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import dynamic_mask_attention
from flexdma.lifespans import Selection
from flexdma.state.joined import empty_run, joined, run_of
from tests.comparison import inputs


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    window, sinks, recent = draw(st.integers(1, 8)), draw(st.integers(0, 3)), draw(st.integers(0, 6))
    policy = Selection(draw(st.sampled_from(["causal", "threshold", "sliding"])), window, sinks, recent)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    _, key, value, gate = inputs(2, 2, 2, 1, sum(lengths), 3, seed=draw(st.integers(0, 99)))
    gate[torch.rand(gate.shape, generator=generator) > 0.9] = draw(st.sampled_from([-torch.inf, torch.nan]))
    masks: list[Any] = [None, None]
    if draw(st.booleans()):
        masks[0] = torch.rand(2, sum(lengths), generator=generator) > 0.3
    if draw(st.booleans()):
        masks[1] = (torch.rand(2, sum(lengths), generator=generator) > 0.9).cumsum(-1) % 3
    return key, value, gate, policy, lengths, masks


def in_order(state):
    """The tensors of a state, with slots in order of position."""
    tensors = state.tensors()
    order = tensors["position"].argsort(-1)
    for name in ("gate", "position"):
        tensors[name] = tensors[name].gather(-1, order)
    for name in ("key", "value"):
        tensors[name] = tensors[name].gather(2, order[..., None].expand_as(tensors[name]))
    return tensors


@given(case=cases(), forwards=st.booleans())
def test_joined_runs_are_the_run_of_all_tokens(case, forwards):
    key, value, gate, policy, lengths, (mask, documents) = case

    def parts(tensor, dim):
        return [None] * len(lengths) if tensor is None else tensor.split(lengths, dim)

    columns = [*(parts(tensor, 2) for tensor in (key, value, gate)), parts(mask, 1), parts(documents, 1)]
    runs = [run_of(k, v, g, policy, m, d) for k, v, g, m, d in zip(*columns, strict=True)]
    runs.insert(1, empty_run(key, value, gate, policy))
    # Joining is associative, so it may begin at either end.
    got = reduce(joined, runs) if forwards else reduce(lambda after, before: joined(before, after), reversed(runs))
    _, want = dynamic_mask_attention(
        key, key, value, gate, window_size=policy.window_size, selection=policy.kind, sinks=policy.sinks,
        recent=policy.recent, key_padding_mask=mask, document_ids=documents, return_state=True,
    )  # fmt: skip
    got, want = in_order(got.state), in_order(want)
    assert (got.pop("last_loss") >= want.pop("last_loss")).all()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
