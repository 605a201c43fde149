"""CPU tensors under `torch.set_default_device` of another device; "meta" stands for a GPU."""

import pytest
import torch

import flexdma
from flexdma import lifespan_attention, policies
from tests.comparison import inputs

TENSORS = inputs(1, 4, 2, 40, 40, 8, dtype=torch.float32)
QUERY, KEY, VALUE, GATE = TENSORS
ALIVE = flexdma.causal_top_w(GATE, 5)
ENDS = torch.tensor([0, 17, 40])


def packed(tensor):
    """[1, H, N, ...] -> [N, H, ...]."""
    return tensor[0].transpose(0, 1)


def attended(**options):
    return flexdma.dynamic_mask_attention(*TENSORS, window_size=5, **options)


def decoded():
    _, state = flexdma.dynamic_mask_attention(
        *(t[:, :, :30] for t in TENSORS), window_size=5, sinks=1, recent=2, return_state=True
    )
    outputs = []
    for part in ((30, 36), (36, 37), (37, 38)):
        new = (t[:, :, slice(*part)] for t in TENSORS)
        output, state = flexdma.dynamic_mask_attention(
            *new, window_size=5, sinks=1, recent=2, state=state, return_state=True
        )
        outputs.append(output)
    return torch.cat(outputs, 2)


def trained():
    tensors = [t.clone().requires_grad_() for t in TENSORS]
    flexdma.dynamic_mask_attention(*tensors, window_size=5).square().sum().backward()
    return torch.cat([t.grad.flatten() for t in tensors])


CALLS = {
    "inference": attended,
    "a score_mod": lambda: attended(score_mod=lambda score, b, h, i, j: score - 0.1 * (i - j)),
    "training": trained,
    "decoding": decoded,
    "several sequences": lambda: flexdma.dynamic_mask_attention_varlen(
        packed(QUERY), packed(KEY), packed(VALUE), packed(GATE), ENDS, window_size=5
    ),
    "growing": lambda: flexdma.growing_attention(QUERY, KEY, VALUE)[0],
    "other births": lambda: lifespan_attention(QUERY, KEY, VALUE, flexdma.Lifespans(ALIVE.birth - 1, ALIVE.death)),
    "mass": lambda: flexdma.attention_mass(QUERY, KEY, ALIVE, bias=GATE),
    "a policy": lambda: policies.h2o_lifespans(QUERY, KEY, 6, 2)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_computes_where_its_tensors_are(name):
    want = CALLS[name]()
    torch.set_default_device("meta")
    try:
        got = CALLS[name]()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, want)
