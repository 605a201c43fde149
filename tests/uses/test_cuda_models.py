"""Layers and converted models on a GPU, as people use them; the same model on the CPU is the oracle."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flexdma import DynamicMaskAttention, dynamic_mask_attention, dynamic_mask_attention_varlen, lifespan_attention
from flexdma.lifespans import Lifespans, causal_top_w
from flexdma.policies import dms_training_lifespans
from flexdma.reference import dense_dynamic_mask_attention, dense_lifespan_attention
from tests.comparison import inputs, with_gradients
from tests.integrations.hf_models import causal_lm, distinct_tokens
from tests.uses.gpu_warnings import TORCHS_OWN_ON_A_GPU

from flexdma.integrations.transformers import calibrate, convert_to_dma, distill, from_pretrained  # isort: skip

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    *map(pytest.mark.filterwarnings, TORCHS_OWN_ON_A_GPU),
]


def layer(recency: Any = "slope", **options):
    torch.manual_seed(0)
    made = DynamicMaskAttention(128, 4, 2, 64, recency=recency, **{"window_size": 32, "sinks": 2, **options})
    torch.nn.init.normal_(made.gate.A)
    return made


def hidden(length, batch=2):
    return torch.randn(batch, length, 128, generator=torch.Generator().manual_seed(length))


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


@torch.no_grad()
def decoded(module, x, prefill):
    """Outputs of a prefill and of single tokens after it, all copied: a CUDA graph overwrites its outputs."""
    output, state = module(x[:, :prefill], return_state=True)
    outputs = [output.clone()]
    for token in range(prefill, x.shape[1]):
        output, state = module(x[:, token : token + 1], state=copy.deepcopy(state), return_state=True)
        outputs.append(output.clone())
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("recency", ["slope", "forget"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recent": 8},
        {"window_size": [16, 48]},
        {"recency_ranks": False, "recent": 8},
        {"selection": "threshold", "window_size": None, "recent": 8},
    ],
)
def test_tokens_one_by_one_are_one_pass(recency, options):
    module, x = layer(recency, **options), hidden(140)
    with torch.no_grad():
        want = module(x)
    module.to(DEVICE)
    torch.testing.assert_close(decoded(module, x.to(DEVICE), 100).cpu(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_layer_decodes(mode):
    module, x = layer(), hidden(120)
    with torch.no_grad():
        want = module(x)
    compiled = torch.compile(module.to(DEVICE), mode=mode)
    torch.testing.assert_close(decoded(compiled, x.to(DEVICE), 100).cpu(), want, atol=1e-4, rtol=1e-4)


def test_a_state_that_moves_to_the_host_and_back_goes_on():
    module, x = layer().to(DEVICE), hidden(120).to(DEVICE)
    with torch.no_grad():
        want = module(x)[:, 100:]
        _, state = module(x[:, :100], return_state=True)
        away = state.to("cpu")
        got, _ = module(x[:, 100:], state=away.to(DEVICE), return_state=True, donate=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_training_in_mixed_precision_at_changing_lengths(compiles, recomputes):
    """The error of gradients is at most twice that under autocast on the CPU; the oracle is the CPU in float32."""
    module = layer()
    rounded, on_gpu = copy.deepcopy(module), copy.deepcopy(module).to(DEVICE)
    called = torch.compile(on_gpu) if compiles else on_gpu
    for length in (256, 300, 515):
        x = hidden(length)
        for each in (module, rounded, on_gpu):
            each.zero_grad()
        module(x).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16):
            rounded(x).float().square().mean().backward()
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            y = x.to(DEVICE)
            output = checkpoint(called, y, use_reentrant=False) if recomputes else called(y)
            output.float().square().mean().backward()
        for (name, exact), *others in zip(
            module.named_parameters(), rounded.parameters(), on_gpu.parameters(), strict=True
        ):
            allowed, error = ((other.grad.cpu() - exact.grad).norm() / exact.grad.norm() for other in others)
            # A slope's gradient multiplies the rounding of each row by a position; see docs/gate-gradient.md.
            assert error <= 2 * allowed + (0.15 if name == "gate.slope" else 0.02), (name, length, error, allowed)


def test_packed_sequences():
    tensors, ends = inputs(1, 4, 2, 300, 300, 64, dtype=torch.float32), [0, 70, 71, 300]
    query, key, value, gate = tensors
    packed = [query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), gate[0].mT]
    document_ids = torch.bucketize(torch.arange(300), torch.tensor(ends[1:]), right=True)[None]
    want = with_gradients(dense_dynamic_mask_attention, tensors, window_size=20, document_ids=document_ids)[0]
    query, key, value, gate = on_device(packed)
    cu_seqlens = torch.tensor(ends, device=DEVICE, dtype=torch.int32)
    got = dynamic_mask_attention_varlen(query, key, value, gate, cu_seqlens, window_size=20)
    torch.testing.assert_close(got.cpu(), want[0].transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_lifespans_of_any_births():
    query, key, value, gate = inputs(1, 4, 2, 400, 400, 64, dtype=torch.float32)
    chosen = causal_top_w(gate, 30)
    generator = torch.Generator().manual_seed(2)
    birth = torch.randint(0, 60, chosen.birth.shape, generator=generator) + chosen.birth
    lifespans = Lifespans(birth, torch.maximum(birth, chosen.death))
    want = with_gradients(partial(dense_lifespan_attention, lifespans=lifespans, bias=None), [query, key, value])
    moved = Lifespans(lifespans.birth.to(DEVICE), lifespans.death.to(DEVICE))
    got = with_gradients(partial(lifespan_attention, lifespans=moved, bias=None), on_device([query, key, value]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


def test_two_intervals_per_key():
    """DMS training: the bias of the second interval, and alpha, get gradients."""
    tensors = inputs(1, 4, 2, 300, 400, 64, dtype=torch.float32)

    def trained(function, query, key, value, alpha):
        lifespans, biases = dms_training_lifespans(alpha, 50)
        return function(query, key, value, lifespans, bias=biases)

    want = with_gradients(partial(trained, dense_lifespan_attention), tensors)
    got = with_gradients(partial(trained, lifespan_attention), on_device(tensors))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lowering", ["gather", "dense"])
def test_the_other_lowerings(lowering):
    tensors = inputs(2, 4, 2, 200, 200, 32, dtype=torch.float32)
    want = with_gradients(dense_dynamic_mask_attention, tensors, window_size=20, sinks=1)
    got = with_gradients(dynamic_mask_attention, on_device(tensors), window_size=20, sinks=1, lowering=lowering)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


def converted(recency):
    """With recency "forget" no two gates are nearly equal, also where generated tokens repeat."""
    model = convert_to_dma(causal_lm("Llama"), [[6, 9], 8], form="linear", recency=recency, sinks=1, recent=2)
    for block in model.model.layers:
        torch.nn.init.uniform_(block.self_attn.value_gate.A)
    return model


@pytest.mark.parametrize("compiles", [False, True])
def test_a_converted_model_generates_the_same_tokens(compiles):
    model, ids = converted("forget"), distinct_tokens(2, 30)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    want = model.generate(ids, **greedy)
    model.to(DEVICE)
    if compiles:
        model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids.to(DEVICE), **greedy).cpu(), want)


def test_calibration_finds_the_gates_that_the_cpu_finds(tmp_path):
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 64, (2, 72), generator=generator) for _ in range(3)]
    models = causal_lm("Llama"), causal_lm("Llama").to(DEVICE)
    options: dict[str, Any] = {"window_size": 5, "sinks": 1, "recent": 2, "far": 6, "slopes": [0.0, 0.05]}
    want = calibrate(models[0], texts, **options)
    got = calibrate(models[1], [t.to(DEVICE) for t in texts], **options)
    torch.testing.assert_close(torch.tensor(got.r_squared), torch.tensor(want.r_squared), atol=1e-3, rtol=1e-3)
    assert sum(map(sum, got.windows)) == sum(map(sum, want.windows))
    with torch.no_grad():
        before = models[1](texts[0].to(DEVICE)).logits
    models[1].save_pretrained(tmp_path)
    with torch.no_grad():
        after = from_pretrained(tmp_path).to(DEVICE)(texts[0].to(DEVICE)).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_distillation_moves_the_gates():
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(3, 64, (6, 2, 64), generator=generator).to(DEVICE))
    model = converted("slope").to(DEVICE)
    weights = [block.self_attn.value_gate.dt_proj.weight.detach().clone() for block in model.model.layers]
    distill(model, batches, far=8, gate_lr=1e-2, lr=1e-2)
    for before, block in zip(weights, model.model.layers, strict=True):
        now = block.self_attn.value_gate.dt_proj.weight
        assert now.device.type == torch.device(DEVICE).type
        assert now.isfinite().all()
        assert not torch.equal(now, before)
