"""A layer with its heads divided over ranks equals the layer in one process, with the gradients of every parameter."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from flexdma import DynamicMaskAttention, ValueGate
from flexdma.distributed import DynamicMaskAttentionParallel, ValueGateParallel

WIDTH, HEADS, KV_HEADS, SIZE, LENGTH = 24, 8, 4, 6, 40
WINDOWS = (5, 9, 3, 7)
RECENCIES = [None, "slope", "forget"]


def tensor_mesh(ranks):
    """A mesh of `ranks` ranks; where the world has more, each such group does the same."""
    return init_device_mesh("cpu", (4 // ranks, ranks), mesh_dim_names=("same", "tensor"))["tensor"]


def made(recency, windows=WINDOWS):
    """A norm and a layer, float64, with parameters that are all different."""
    layer = DynamicMaskAttention(
        WIDTH,
        HEADS,
        KV_HEADS,
        SIZE,
        windows,
        recency=recency,
        sinks=1,
        recent=2,
        qk_norm=True,
        output_gate=True,
        bias=True,
    )
    model = nn.ModuleDict({"norm": nn.RMSNorm(WIDTH), "attention": layer}).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def given():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    angle = torch.randn(LENGTH, SIZE // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3] = mask[1, 20:24] = False
    return hidden, {"position_embeddings": (angle.cos(), angle.sin()), "key_padding_mask": mask}


def by_head(score, b, h, i, j):
    """Scores of each query head in another unit, so that a head with the number of another is noticed."""
    return score * (1 + h)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def errors(got, want):
    """{name: the largest error, relative to the largest number} of tensors by name; DTensors as a whole."""
    assert got.keys() == want.keys()
    return {name: ((whole(got[name]) - want[name]).abs().max() / want[name].abs().max()).item() for name in want}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def equal_to_one_process(ranks, recency, sequence_parallel):
    one, mesh = made(recency), tensor_mesh(ranks)
    hidden, options = given()
    many = copy.deepcopy(one)
    plan: dict[str, ParallelStyle] = {"attention": DynamicMaskAttentionParallel()}
    if sequence_parallel:
        attention = DynamicMaskAttentionParallel(input_layouts=Shard(1), output_layouts=Shard(1))
        plan = {"norm": SequenceParallel(), "attention": attention}
    parallelize_module(many, mesh, plan)

    results = {}
    for name, model in {"one": one, "many": many}.items():
        own = hidden.clone()
        shard = sequence_parallel and model is many
        if shard:
            own = own.chunk(ranks, 1)[mesh.get_local_rank()].clone()
        own.requires_grad_()
        output = model["attention"](model["norm"](own), score_mod=by_head, **options)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        if shard:
            weights = weights.chunk(ranks, 1)[mesh.get_local_rank()]
        (output * weights).sum().backward()
        values = {"output": output.detach(), "hidden": own.grad}
        if shard:
            values = {key: DTensor.from_local(value, mesh, [Shard(1)]) for key, value in values.items()}
        results[name] = values | gradients(model)
    return errors(results["many"], results["one"])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_equals_one_process_with_all_gradients(ranks, recency, sequence_parallel, four):
    for found in four.run(equal_to_one_process, ranks, recency, sequence_parallel):
        assert max(found.values()) < 1e-6, found


def other_calls():
    """The largest errors of calls with other arguments than those above."""
    one, mesh = made("slope")["attention"], tensor_mesh(4)
    whole_tokens = DynamicMaskAttentionParallel()
    divided_tokens = DynamicMaskAttentionParallel(output_layouts=Shard(1), use_local_output=False)
    many, uneven = (parallelize_module(copy.deepcopy(one), mesh, plan) for plan in (whole_tokens, divided_tokens))
    hidden = given()[0][:1]
    documents = torch.arange(LENGTH)[None] // 15
    ends = torch.tensor([0, 13, 13, LENGTH])
    results = {
        "document_ids": [layer(hidden, document_ids=documents) for layer in (many, one)],
        "cu_seqlens": [layer(hidden, cu_seqlens=ends) for layer in (many, one)],
        "by keyword": [layer(hidden_states=hidden) for layer in (many, one)],
        "tokens that do not divide": [uneven(distribute_tensor(hidden[:, 1:], mesh, [Shard(1)])), one(hidden[:, 1:])],
    }
    added = DynamicMaskAttention(WIDTH, HEADS, KV_HEADS, SIZE, WINDOWS, recency="forget", recency_ranks=False).double()
    parallel = parallelize_module(copy.deepcopy(added), mesh, whole_tokens)
    results["a recency that does not rank"] = [parallel(hidden), added(hidden)]
    sliding = DynamicMaskAttention(
        WIDTH, HEADS, KV_HEADS, SIZE, WINDOWS, selection="sliding", output_gate=True
    ).double()
    for parameter in sliding.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    results["sliding"] = [parallelize_module(copy.deepcopy(sliding), mesh, whole_tokens)(hidden), sliding(hidden)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["autocast"] = [layer(hidden) for layer in (many, one)]
    return {name: ((whole(a) - b).abs().max() / b.abs().max()).item() for name, (a, b) in results.items()}


def test_other_calls_equal_one_process(four):
    for found in four.run(other_calls):
        assert found.pop("autocast") < 0.02  # the sums of bfloat16 numbers are rounded on each rank
        assert max(found.values()) < 1e-6, found


def read_in_chunks(recency):
    one, mesh = made(recency), tensor_mesh(4)
    hidden, _ = given()
    want = one["attention"](hidden)
    layer: Any = parallelize_module(copy.deepcopy(one["attention"]), mesh, DynamicMaskAttentionParallel())
    outputs: list[torch.Tensor] = []
    state = layer.empty_state(2)
    for grad, donate, sizes in ((True, False, (11, 1)), (False, False, (12, 1, 1, 1)), (False, True, (1, 1, 11))):
        with torch.set_grad_enabled(grad):
            for size in sizes:
                start = sum(output.shape[1] for output in outputs)
                part = hidden[:, start : start + size]
                output, state = layer(part, state=state, return_state=True, donate=donate)
                outputs.append(output)
    kinds = {type(tensor) for tensor in state.tensors().values()}
    return (torch.cat(outputs, 1) - want).abs().max().item(), state.key.shape[1], state.window_size, kinds


@pytest.mark.parametrize("recency", RECENCIES)
def test_a_state_holds_the_heads_of_its_rank(recency, four):
    for rank, (error, heads, windows, kinds) in enumerate(four.run(read_in_chunks, recency)):
        assert error < 1e-5
        assert (heads, windows) == (1, WINDOWS[rank])
        assert kinds == {torch.Tensor}


class Sent(TorchDispatchMode):
    """The collectives of a region, each (operator, numbers in its argument)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "_c10d_functional" and "wait" not in str(function) and "wrap" not in str(function):
            self.calls.append((str(function).split(".")[1], arguments[0].numel()))
        return function(*arguments, **(keywords or {}))


def communication(recency):
    gate, mesh = ValueGate(KV_HEADS, SIZE, recency=recency), tensor_mesh(4)
    parallelize_module(gate, mesh, ValueGateParallel())
    value = torch.randn(2, 1, LENGTH, SIZE, requires_grad=True)
    with Sent() as forward:
        output = gate(value)
    with Sent() as backward:
        output.sum().backward()
    return output.shape[1], forward.calls, backward.calls


@pytest.mark.parametrize("recency", RECENCIES)
def test_gates_communicate_one_number_per_key_and_head(recency, four):
    times = 2 if recency == "forget" else 1
    for heads, forward, backward in four.run(communication, recency):
        assert heads == 1
        assert forward == times * [("reduce_scatter_tensor", 2 * LENGTH * KV_HEADS)]
        # Each rank gathers the gradients of the logits, one of four parts of which are its own.
        assert backward == times * [("all_gather_into_tensor", 2 * LENGTH * KV_HEADS // 4)]


def started_without_memory():
    with torch.device("meta"):
        gate = ValueGate(KV_HEADS, SIZE, recency="slope", slopes=[0.5, 0.25, 0.2, 0.1])
    parallelize_module(gate, tensor_mesh(4), ValueGateParallel())
    gate.to_empty(device="cpu")
    for module in gate.modules():
        if isinstance(module, ValueGate | nn.Linear):
            module.reset_parameters()
    return whole(gate.slope).tolist(), whole(gate.A).tolist()


def test_a_gate_starts_without_memory(four):
    for slope, scale in four.run(started_without_memory):
        assert slope == pytest.approx([0.5, 0.25, 0.2, 0.1])
        assert scale == [1.0] * 4


def refusals():
    mesh = tensor_mesh(4)
    attempts = {
        "heads": (DynamicMaskAttention(16, 8, 2, 2, 4), DynamicMaskAttentionParallel()),
        "gate heads": (ValueGate(6, 4), ValueGateParallel()),
        "module": (nn.Linear(4, 4), ValueGateParallel()),
        "twice": (parallelize_module(ValueGate(4, 4), mesh, ValueGateParallel()), ValueGateParallel()),
    }
    raised = {}
    for name, (module, plan) in attempts.items():
        try:
            parallelize_module(module, mesh, plan)
        except (ValueError, TypeError) as error:
            raised[name] = str(error)
    return raised


def test_what_cannot_be_divided_is_refused_by_name(four):
    for raised in four.run(refusals):
        assert raised == {
            "heads": "num_kv_heads: expected a multiple of the 4 ranks of the mesh, got 2",
            "gate heads": "num_kv_heads: expected a multiple of the 4 ranks of the mesh, got 6",
            "module": "parallelize_plan: expected a ValueGate at this name, got a Linear",
            "twice": "A: expected a whole parameter, got a sharded one; apply this plan once, before fully_shard",
        }


def converted_model():
    from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma
    from tests.integrations.hf_models import causal_lm, distinct_tokens

    model, ids = convert_to_dma(causal_lm("Llama"), 6, recency="slope"), distinct_tokens(2, 24)
    for name, parameter in model.named_parameters():
        if "value_gate" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    plan: dict[str, ParallelStyle] = {
        **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.self_attn.value_gate": ValueGateParallel(),
    }
    divided, cache = parallelize_module(copy.deepcopy(model), tensor_mesh(2), plan), DynamicMaskCache()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = [divided(part, past_key_values=cache).logits for part in ids.split([16, 7, 1], 1)]
    layer: Any = cache.layers[0]
    return (torch.cat(got, 1) - want).abs().max().item(), layer.state.key.shape[1]


# Imports transformers on each rank.
@pytest.mark.slow
def test_a_converted_model_is_divided(four):
    for error, heads in four.run(converted_model):
        assert error < 1e-4
        assert heads == 1
