"""The demo's model under FSDP2 and DDP, with activation checkpointing, equals one process after some steps."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from flexdma import DynamicMaskAttention, ValueGate
from flexdma.tools.byte_models.model import ByteModel, ModelSizes

SIZES = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, window=5)
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
CHECKPOINTING: dict[str, Callable[..., nn.Module]] = {
    "none": lambda block: block,
    "full": checkpoint_wrapper,
    "selective": partial(checkpoint_wrapper, context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS)),
}


def made(recency="slope"):
    model = ByteModel("dma-recency", SIZES, recency=recency, seed=0)
    generator = torch.Generator().manual_seed(0)
    for attention in model.attentions():
        nn.init.normal_(attention.gate.A, generator=generator)
    return model


def shard_blocks(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def shard_linears(model):
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(model)


WRAPPERS = {"fsdp-blocks": shard_blocks, "fsdp-linears": shard_linears, "ddp": DistributedDataParallel}


def trained(model, rows, steps=3):
    """The losses of some steps of AdamW on rows of a batch of four sequences, which differ in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        windows = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(step))[rows]
        loss = cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model):
    """{name: parameter}, without shards and the names that wrappers add."""
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for added in ("module.", "_checkpoint_wrapped_", "_orig_mod."):
            name = name.replace(added, "")
        found[name] = tensor.detach()
    return found


def equal_to_one_process(wrapper, checkpointing, recency, backend):
    one, model = made(recency), made(recency)
    want = trained(one, slice(None))
    for number, block in enumerate(model.blocks):
        block = CHECKPOINTING[checkpointing](block)
        model.blocks[number] = block
        if backend is not None:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
    wrapped = WRAPPERS[wrapper](model)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = torch.tensor(trained(wrapped, slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)))
    torch.distributed.all_reduce(losses)
    torch.testing.assert_close(losses / ranks, torch.tensor(want), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole(wrapped), dict(one.named_parameters()), atol=1e-5, rtol=1e-4)


# Selective checkpointing of a block with shards inside counts FSDP's own profiler operators, and torch 2.13 refuses the
# recomputation, of plain PyTorch layers too.
COMBINATIONS = [
    (wrapper, checkpointing)
    for wrapper in WRAPPERS
    for checkpointing in CHECKPOINTING
    if (wrapper, checkpointing) != ("fsdp-linears", "selective")
]


@pytest.mark.parametrize(("wrapper", "checkpointing"), COMBINATIONS)
def test_the_model_trains_as_in_one_process(wrapper, checkpointing, four):
    recency = "forget" if checkpointing == "full" else "slope"
    four.run(equal_to_one_process, wrapper, checkpointing, recency, None)


@pytest.mark.parametrize("wrapper", ["fsdp-blocks", "ddp"])
def test_the_compiled_model_trains_as_in_one_process(wrapper, two):
    two.run(equal_to_one_process, wrapper, "selective" if wrapper == "ddp" else "none", "slope", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("wrapper", ["fsdp-blocks", "ddp"])
def test_the_model_trains_compiled_by_inductor_as_in_one_process(wrapper, checkpointing, two):
    two.run(equal_to_one_process, wrapper, checkpointing, "slope", "inductor")


def continued(folder, sharded):
    """Two steps, a checkpoint in `folder`, and two more; or (not `sharded`) the two more after loading it."""
    model = shard_blocks(made())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def step(number):
        windows = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(number))
        loss = cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    if sharded:
        step(0), step(1)
    weights, moments = get_state_dict(model, optimizer)
    if sharded:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    else:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return [step(2), step(3)], {name: tensor.numpy() for name, tensor in whole(model).items()}


@pytest.mark.filterwarnings("ignore:Detected:UserWarning")
def test_a_checkpoint_of_four_ranks_goes_on_on_two(tmp_path, four, two):
    losses, weights = four.run(continued, tmp_path / "checkpoint", True)[0]
    resumed, again = two.run(continued, tmp_path / "checkpoint", False)[0]
    assert resumed == pytest.approx(losses, rel=1e-5)
    for name in weights:
        torch.testing.assert_close(torch.tensor(again[name]), torch.tensor(weights[name]), atol=1e-5, rtol=1e-4)


def read(call, layer, hidden):
    """Outputs in chunks, and the last state; with gradients first, then without, and the last token donated."""
    outputs: list[torch.Tensor] = []
    state = layer.empty_state(2)
    for size in (11, 8):
        output, state = call(hidden[:, :size], state=state, return_state=True)
        outputs, hidden = [*outputs, output], hidden[:, size:]
    torch.cat(outputs, 1).float().square().mean().backward()
    with torch.no_grad():
        for token in hidden.unbind(1):
            output, state = call(token[:, None], state=state.detach(), return_state=True, donate=True)
            outputs.append(output)
    return torch.cat(outputs, 1).detach(), state


def states_in(wrapper, recency):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency, recent=2, qk_norm=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    hidden = torch.randn(2, 22, 32, generator=generator)
    one = copy.deepcopy(layer)
    wrapped = (shard_linears if wrapper == "fsdp" else partial(DistributedDataParallel, find_unused_parameters=True))(
        layer
    )
    (want, last), (got, state) = read(one, one, hidden), read(wrapped, layer, hidden)
    torch.testing.assert_close(got, want)
    for name, tensor in state.tensors().items():
        assert type(tensor) is torch.Tensor
        torch.testing.assert_close(tensor, last.tensors()[name], msg=name)


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_states_are_left_alone(wrapper, recency, two):
    two.run(states_in, wrapper, recency)


def mixed_precision(recency):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency)
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    for casts in (False, True):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=casts)
        sharded: Any = fully_shard(copy.deepcopy(layer), mp_policy=policy)
        first = sharded.empty_state(2, dtype=torch.bfloat16)
        try:
            _, state = sharded(hidden.bfloat16(), state=first, return_state=True)
        except TypeError as error:
            refused = str(error)
        else:
            dtypes = state.gate.dtype, state.forgotten.dtype, state.key.dtype
    return dtypes, refused


@pytest.mark.parametrize(("recency", "gates"), [(None, torch.float32), ("forget", torch.float64)])
def test_states_are_not_cast_by_a_policy_of_mixed_precision(recency, gates, two):
    for dtypes, refused in two.run(mixed_precision, recency):
        assert dtypes == (gates, torch.float64, torch.bfloat16)
        assert refused == (
            f"state: expected gate of {gates}, got torch.bfloat16; "
            "if fully_shard cast the state, pass cast_forward_inputs=False in its MixedPrecisionPolicy"
        )


def converted_of_16_bits():
    from flexdma.integrations.transformers import convert_to_dma
    from tests.integrations.hf_models import causal_lm, distinct_tokens

    model, ids = convert_to_dma(causal_lm("Llama"), 7).bfloat16(), distinct_tokens(2, 24)
    for layer in model.model.layers:
        fully_shard(layer.self_attn.value_gate)
        fully_shard(layer)
    fully_shard(model)
    model(ids, labels=ids).loss.backward()
    return [layer.self_attn.value_gate.A.grad.full_tensor() for layer in model.model.layers]


def test_a_converted_model_of_16_bits_is_sharded_with_its_float32_gates_apart(two):
    pytest.importorskip("transformers")
    for gradients in two.run(converted_of_16_bits):
        assert all(gradient.dtype == torch.float32 and gradient.abs().min() > 0 for gradient in gradients)


def started_without_memory(recency):
    with torch.device("meta"):
        layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency)
    fully_shard(layer)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if isinstance(module, nn.Linear | ValueGate):
            module.reset_parameters()
    gate = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency).gate
    torch.testing.assert_close(whole(layer)["gate.A"], gate.A.detach())
    if recency == "slope":
        torch.testing.assert_close(whole(layer)["gate.slope"], gate.slope.detach())
    return layer(torch.randn(1, 12, 32)).isfinite().all().item()


@pytest.mark.parametrize("recency", ["slope", "forget"])
def test_a_layer_is_sharded_before_it_has_memory(recency, two):
    assert two.run(started_without_memory, recency) == [True, True]


def cache_of_a_converted_model():
    from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma
    from tests.integrations.hf_models import causal_lm, distinct_tokens

    model, ids = convert_to_dma(causal_lm("Llama"), 6, recency="slope"), distinct_tokens(2, 24)
    results = []
    for shard in (False, True):
        if shard:
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        cache = DynamicMaskCache()
        with torch.no_grad():
            logits = [model(part, past_key_values=cache).logits for part in ids.split([16, 7, 1], 1)]
        layer: Any = cache.layers[1]
        results.append([torch.cat(logits, 1), *layer.state.tensors().values()])
    for got, want in zip(*results, strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, want)


# Imports transformers on each rank.
@pytest.mark.slow
def test_a_cache_of_a_converted_model_is_left_alone(two):
    two.run(cache_of_a_converted_model)
