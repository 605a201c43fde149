"""torch.func, forward-mode AD and tracers: the same numbers as the dense specification, or a refusal by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from flexdma.lowerings import plain
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.score_mods import alibi_score_mod
from tests.comparison import inputs

PADDING = torch.arange(20) >= torch.tensor([[0], [4]])
SINKS = {"sink_logits": torch.linspace(-1, 2, 4, dtype=torch.float64)}
OPTIONS: list[dict[str, Any]] = [
    {"window_size": 5},
    {"window_size": [5, 3], "sinks": 1, "recent": 2, "selection": "threshold", "key_padding_mask": PADDING},
    {"window_size": 5, "selection": "global", "score_mod": alibi_score_mod(torch.rand(4)), **SINKS},
]
WITH_STATE: dict[str, Any] = {"window_size": 4, "sinks": 1, "recent": 1, **SINKS}


def in_chunks(*tensors):
    """Prefill, two tokens, another chunk."""
    outputs, state = [], None
    for start, end in [(0, 12), (12, 13), (13, 14), (14, 20)]:
        chunk = [t[:, :, start:end] for t in tensors]
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **WITH_STATE)
        outputs.append(output)
    return torch.cat(outputs, 2)


CASES: list[list[Callable[..., torch.Tensor]]] = [
    [partial(f, **options) for f in (dynamic_mask_attention, dense_dynamic_mask_attention)] for options in OPTIONS
]
CASES.append([in_chunks, partial(dense_dynamic_mask_attention, **WITH_STATE)])
PAIRS = pytest.mark.parametrize(("attend", "specification"), CASES, ids=["causal", "threshold", "global", "state"])


def samples(count, queries=20):
    """Query, key, value, gate, each [count, B, ...]."""
    return [torch.stack(t) for t in zip(*(inputs(2, 4, 2, queries, 20, 4, seed=n) for n in range(count)), strict=True)]


def sum_of_squares(attend):
    return lambda *tensors: attend(*tensors).square().sum()


def gradients(attend):
    """Gradients by plain autograd."""

    def function(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(sum_of_squares(attend)(*leaves), leaves)

    return function


def one_by_one(function, batches):
    results = [function(*tensors) for tensors in zip(*batches, strict=True)]
    return tree_map(lambda *parts: torch.stack(parts), *results)


@PAIRS
@pytest.mark.parametrize("mapped", [(0, 1, 2, 3), (0,), (1,), (3,)])
def test_vmap_is_one_call_after_another(attend, specification, mapped):
    batches = [t if n in mapped else t[:1].expand_as(t) for n, t in enumerate(samples(3))]
    in_dims = tuple(2 if n in mapped else None for n in range(4))
    given = [t.movedim(0, 2) if n in mapped else t[0] for n, t in enumerate(batches)]
    torch.testing.assert_close(vmap(attend, in_dims=in_dims)(*given), one_by_one(specification, batches))


def test_vmap_over_masks():
    tensors = [t[0] for t in samples(1)]
    masks = torch.stack([PADDING, PADDING.flip(0)])
    documents = (torch.arange(20) > torch.tensor([[[6], [9]], [[3], [20]]])).long()

    def attend(mask, ids, attend=dynamic_mask_attention):
        return attend(*tensors, window_size=5, key_padding_mask=mask, document_ids=ids)

    want = one_by_one(partial(attend, attend=dense_dynamic_mask_attention), [masks, documents])
    torch.testing.assert_close(vmap(attend)(masks, documents), want)


@PAIRS
@pytest.mark.parametrize("chunk", [plain.CHUNK_ELEMENTS, 100])
def test_gradients_per_sample(attend, specification, chunk, monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(plain, "KEPT_ELEMENTS", chunk)
    batches, every = samples(3), (0, 1, 2, 3)
    want = one_by_one(gradients(specification), batches)
    torch.testing.assert_close(vmap(grad(sum_of_squares(attend), argnums=every))(*batches), want)

    def total(*tensors):
        return vmap(sum_of_squares(attend))(*tensors).sum()

    torch.testing.assert_close(grad(total, argnums=every)(*batches), want)


def test_a_hessian():
    tensors = [t[0, :1, :, :6] for t in samples(1)]

    def curvature(attend):
        return hessian(lambda query, gate: sum_of_squares(attend)(query, *tensors[1:3], gate), argnums=(0, 1))

    attend, specification = CASES[0]
    torch.testing.assert_close(
        curvature(attend)(tensors[0], tensors[3]), curvature(specification)(tensors[0], tensors[3])
    )


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
@pytest.mark.parametrize("lowering", [None, "dense"])
def test_gradients_per_sample_of_a_layer(recency, lowering):
    layer = DynamicMaskAttention(16, 4, 2, 8, 3, recency=recency, qk_norm=True, lowering=lowering).double()
    torch.nn.init.normal_(layer.gate.A)
    hidden, parameters = torch.randn(3, 20, 16, dtype=torch.float64), dict(layer.named_parameters())
    per_sample = vmap(grad(lambda p, x: functional_call(layer, p, (x[None],)).square().sum()), in_dims=(None, 0))
    for function in (per_sample, torch.compile(per_sample, backend="eager", fullgraph=True)):
        got = function({name: p.detach() for name, p in parameters.items()}, hidden)
        for n, sample in enumerate(hidden):
            want = torch.autograd.grad(layer(sample[None]).square().sum(), list(parameters.values()))
            for (name, ours), theirs in zip(got.items(), want, strict=True):  # gates are float32
                torch.testing.assert_close(ours[n], theirs, atol=1e-5, rtol=1e-5, msg=name)


# Forward mode: without requires_grad, so that only tangents show that a derivative is needed.


def by_dual_tensors(attend, tensors, tangents):
    with forward_ad.dual_level():
        duals = [t if d is None else forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(attend(*duals)))


@PAIRS
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode(attend, specification, mode):
    tensors, tangents = ([t[n] for t in samples(2)] for n in (0, 1))
    want = jvp(specification, tuple(tensors), tuple(tangents))
    with mode():
        torch.testing.assert_close(jvp(attend, tuple(tensors), tuple(tangents)), want)
        torch.testing.assert_close(by_dual_tensors(attend, tensors, tangents), want)
    for n, alone in enumerate(tangents):
        some = [alone if m == n else None for m in range(4)]
        torch.testing.assert_close(
            by_dual_tensors(attend, tensors, some), by_dual_tensors(specification, tensors, some)
        )


@PAIRS
def test_forward_mode_by_finite_differences(attend, specification):
    tensors, tangents = ([t[n] for t in samples(2)] for n in (0, 1))
    tensors[3] = tensors[3] + torch.linspace(0, 0.1, 20, dtype=torch.float64)  # no ties, so that no selection changes
    ahead, behind = (attend(*(t + e * d for t, d in zip(tensors, tangents, strict=True))) for e in (1e-6, -1e-6))
    tangent = by_dual_tensors(attend, tensors, tangents)[1]
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, atol=1e-7, rtol=1e-7)


def test_forward_mode_of_what_a_score_mod_captures():
    tensors, slopes, tangent = inputs(1, 4, 2, 20, 20, 4), torch.rand(4).double(), torch.rand(4).double()
    got, want = (
        jvp(lambda s, a=attend: a(*tensors, window_size=5, score_mod=alibi_score_mod(s)), (slopes,), (tangent,))
        for attend in (dynamic_mask_attention, dense_dynamic_mask_attention)
    )
    torch.testing.assert_close(got, want)


def test_flex_refuses_transforms_by_name_and_is_not_chosen_there(monkeypatch):
    tensors, message = inputs(1, 4, 2, 20, 20, 4, dtype=torch.float32), "lowering: 'flex' has no rules for torch.func"

    def attend(*tensors):
        return dynamic_mask_attention(*tensors, window_size=5, lowering="flex")

    with pytest.raises(ValueError, match=message):
        by_dual_tensors(attend, tensors, tensors)
    with pytest.raises(ValueError, match=message):
        vmap(lambda query: attend(query, *tensors[1:]))(tensors[0][None])
    want = by_dual_tensors(CASES[0][0], tensors, tensors)
    monkeypatch.setattr("flexdma.lowerings.choice.choose_lowering", lambda *arguments: "flex")
    torch.testing.assert_close(by_dual_tensors(CASES[0][0], tensors, tensors), want)


# Tracers


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_is_refused_by_name():
    layer = DynamicMaskAttention(16, 4, 2, 8, 3).requires_grad_(False)
    state, hidden, tensors = layer.empty_state(1), torch.randn(1, 9, 16), tuple(inputs(1, 4, 2, 20, 20, 4))
    for function, example in (
        (lambda *t: dynamic_mask_attention(*t, window_size=3), tensors),
        (layer, (hidden,)),
        (lambda x: layer(x, state=state), (hidden[:, :1],)),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace: expected torch\.export\.export or"):
            torch.jit.trace(function, example)


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@torch.no_grad()
def test_make_fx_records_no_selection(tracing_mode):
    attend, specification = CASES[0]
    example, other = ([t[n] for t in samples(2)] for n in (0, 1))
    recorded = make_fx(attend, tracing_mode=tracing_mode)(*example)
    torch.testing.assert_close(recorded(*other), specification(*other))
