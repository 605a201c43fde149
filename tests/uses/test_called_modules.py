"""Projections are called, so that offloading, sharding, pruning, quantisation and hooks act."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from flexdma import DynamicMaskAttention
from flexdma.reference import dense_dynamic_mask_attention
from tests.integrations.hf_models import causal_lm, distinct_tokens

import accelerate  # isort: skip  # after hf_models, which keeps transformers offline
from flexdma.integrations.transformers import convert_to_dma

RECENCIES = [None, "slope", "forget"]


def made(recency=None):
    torch.manual_seed(0)
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency, qk_norm=True, output_gate=True, bias=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def read(layer, hidden, **options):
    """Read the input in two chunks and a token; layers whose weights are on meta need the device."""
    state, outputs = layer.empty_state(2, **options), []
    for part in hidden.split([11, 8, 1], 1):
        output, state = layer(part, state=state, return_state=True)
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.fixture
def hidden():
    return torch.randn(2, 20, 32)


@torch.no_grad()
@pytest.mark.parametrize("recency", RECENCIES)
def test_offloaded_weights(recency, hidden):
    layer = made(recency)
    want = layer(hidden)
    layer = accelerate.cpu_offload(layer, execution_device="cpu")
    assert layer.gate.A.is_meta
    assert torch.equal(layer(hidden), want)
    torch.testing.assert_close(read(layer, hidden, device="cpu", dtype=torch.float32), want)
    with pytest.raises(ValueError, match="device: expected the device that this layer computes on"):
        layer.empty_state(2)


# transformers 5.17 warns that the first weight is on the meta device.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@torch.no_grad()
def test_a_model_with_layers_on_disk(tmp_path):
    model, ids = convert_to_dma(causal_lm("Llama"), 6, recency="slope"), distinct_tokens(2, 24)
    for name, parameter in model.named_parameters():
        if "value_gate" in name:
            nn.init.normal_(parameter)
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "no_repeat_ngram_size": 1}
    want, continued = model(ids).logits, model.generate(ids[:, :12], **greedy)
    model = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.model.layers[1].self_attn.value_gate.dt_proj.weight.is_meta
    assert torch.equal(model(ids).logits, want)
    assert torch.equal(model.generate(ids[:, :12], **greedy), continued)


def test_pruned_weights_are_computed_at_each_step(hidden):
    layer, want = made("forget"), made("forget")
    pruned = ("gate.dt_proj", "gate.forget_proj", "v_proj")
    for name in pruned:
        prune.random_unstructured(layer.get_submodule(name), "weight", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for _ in range(3):
        weights = dict(layer.state_dict())
        for name in pruned:
            weights[f"{name}.weight"] = weights.pop(f"{name}.weight_orig") * weights.pop(f"{name}.weight_mask")
        want.load_state_dict(weights)
        output = layer(hidden)
        torch.testing.assert_close(output, want(hidden))
        optimizer.zero_grad()
        output.square().sum().backward()
        assert (layer.gate.dt_proj.weight_orig.grad != 0).any()
        optimizer.step()


@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("return_state", [False, True])
def test_each_module_is_called_once(recency, return_state, hidden):
    layer, called = made(recency), []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    layer(hidden, return_state=return_state)
    assert sorted(called) == sorted(name for name, _ in layer.named_modules())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantize.*deprecated")
def test_quantised_weights(hidden):
    layer = torch.ao.quantization.quantize_dynamic(made(), {nn.Linear}, torch.qint8)
    assert not isinstance(layer.gate.dt_proj.weight, torch.Tensor)
    query, key, value = layer.project(hidden)
    step = layer.gate.dt_proj(value.transpose(1, 2).flatten(2)).mT
    gate = layer.gate.A[:, None] * step
    want = dense_dynamic_mask_attention(query, key, value, gate, window_size=5)
    want = want.transpose(1, 2).flatten(2) * layer.g_proj(hidden).sigmoid()
    torch.testing.assert_close(layer(hidden), layer.o_proj(want))
    assert layer.empty_state(2).key.dtype == torch.float32
    assert read(layer, hidden).isfinite().all()


@pytest.fixture(scope="module")
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("recency", RECENCIES)
def test_weights_sharded_per_linear(recency, hidden):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = made(recency)
    sharded, mesh = copy.deepcopy(layer), init_device_mesh("cpu", (1,))
    for module in list(sharded.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for each in (layer, sharded):
        each(hidden).square().sum().backward()
    for (name, want), got in zip(layer.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=name)


@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("order", [list, reversed])
def test_a_layer_that_was_made_without_memory(recency, order, hidden):
    with torch.device("meta"):
        layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency)
    layer.to_empty(device="cpu")
    for module in order(list(layer.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    want = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency).gate
    assert torch.equal(layer.gate.A, want.A)
    if recency == "slope":
        assert torch.equal(layer.gate.slope, want.slope)
    elif recency == "forget":
        assert torch.equal(layer.gate.forget_proj.bias, want.forget_proj.bias)
    assert layer(hidden).isfinite().all()
