"""A layer over a sequence that is divided over ranks equals the layer over it in one process."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from flexdma import DynamicMaskAttention
from flexdma.distributed import context_parallel, shard_positions

WORLD = 4
LENGTHS = [9, 21, 3, 7]
RECENCIES = [None, "slope", "forget"]


def make_layer(recency, window_size=6, **options):
    torch.manual_seed(1)
    if recency == "added":  # a recency that does not rank
        recency, options = "forget", {"recency_ranks": False}
    if recency == "sliding":  # a layer without a gate
        recency, options = None, {"selection": "sliding"}
    layer = DynamicMaskAttention(
        32, 4, 2, 8, window_size, recency=recency, sinks=1, recent=2, output_gate=True, **options
    ).double()
    if layer.gate is not None:
        layer.gate.float()
        nn.init.normal_(layer.gate.A)
    return layer


def tokens():
    """Hidden states [2, N, 32], padding mask and document ids [2, N] of the whole sequence."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, sum(LENGTHS), 32, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, sum(LENGTHS), generator=generator) > 0.2
    return hidden, mask, (torch.rand(2, sum(LENGTHS), generator=generator) > 0.95).cumsum(-1)


def rotary(positions):
    angles = positions[:, None] / 10 ** torch.arange(4, dtype=torch.float64)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def results(layer, hidden, positions, mask, documents, *, wrap=None, autocast=False):
    """Output, gradient of hidden states, and those of parameters, of a call with a loss that is a sum over tokens."""
    hidden = hidden.clone().requires_grad_()
    call = layer if wrap is None else wrap(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = call(hidden, rotary(positions), key_padding_mask=mask, document_ids=documents)
    output.double().square().sum().backward()
    parameters = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return output.detach(), hidden.grad, parameters


def changing_lengths(layer):
    """The compiled layer after calls with fewer tokens."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def call(hidden, tables, **masks):
        for tokens in (2, 3):
            fewer = {name: mask[:, :tokens] for name, mask in masks.items()}
            compiled(hidden[:, :tokens], [table[:tokens] for table in tables], **fewer)
        return compiled(hidden, tables, **masks)

    return call


def on_ranks(layer, how, autocast=False, lengths=LENGTHS):
    """`results` of this rank's part; None on ranks without one."""
    mesh = DeviceMesh("cpu", list(range(len(lengths))))
    if mesh.get_coordinate() is None:
        return None
    layer = copy.deepcopy(context_parallel(layer, mesh))
    hidden, mask, documents = (tensor.split(lengths, 1)[mesh.get_local_rank()] for tensor in tokens())
    positions = shard_positions(hidden.shape[1], mesh)
    wrap = {
        "eager": None,
        "checkpointed": lambda layer: (
            lambda *inputs, **options: checkpoint(layer, *inputs, use_reentrant=False, **options)
        ),
        "compiled": lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager"),
        "compiled for changing lengths": changing_lengths,
        "compiled by Inductor": lambda layer: torch.compile(layer, fullgraph=True),
    }[how]
    return results(
        layer, hidden.to(layer.o_proj.weight.dtype), positions, mask, documents, wrap=wrap, autocast=autocast
    )


def whole(answers):
    """Output, gradients of hidden states and of parameters for the whole sequence."""
    outputs, hidden, parameters = zip(*(answer for answer in answers if answer is not None), strict=True)
    return [torch.cat(outputs, 1), torch.cat(hidden, 1), *(sum(p[name] for p in parameters) for name in parameters[0])]


def in_one_process(layer, **options):
    hidden, mask, documents = tokens()
    hidden = hidden.to(layer.o_proj.weight.dtype)
    output, gradient, parameters = results(layer, hidden, torch.arange(sum(LENGTHS)), mask, documents, **options)
    return [output, gradient, *parameters.values()]


@pytest.mark.parametrize(
    ("recency", "how", "lengths"),
    [
        *((recency, "eager", LENGTHS) for recency in RECENCIES),
        ("sliding", "eager", LENGTHS),
        ("added", "eager", LENGTHS),
        ("forget", "checkpointed", LENGTHS),
        ("slope", "compiled", [30, 10]),
        pytest.param("forget", "compiled for changing lengths", LENGTHS, marks=pytest.mark.slow),
        pytest.param("slope", "compiled by Inductor", LENGTHS, marks=pytest.mark.slow),
    ],
)
def test_ranks_compute_what_one_process_computes(four, recency, how, lengths):
    got = whole(four.run(on_ranks, make_layer(recency), how, False, lengths))
    for a, b in zip(got, in_one_process(make_layer(recency)), strict=True):
        # Gates are float32; their rounding depends on how many tokens a call has.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recency", RECENCIES)
def test_autocast_rounds_as_in_one_process(four, recency):
    exact = in_one_process(make_layer(recency))
    got = whole(four.run(on_ranks, make_layer(recency).float(), "eager", True))
    plain = in_one_process(make_layer(recency).float(), autocast=True)
    assert got[0].dtype == plain[0].dtype == torch.bfloat16
    for a, b, c in zip(got, plain, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


def gradients_of_shards(layer):
    """The whole gradients of parameters, by FSDP2, which averages over ranks."""
    mesh = init_device_mesh("cpu", (WORLD,))
    layer = fully_shard(context_parallel(layer, mesh), mesh=mesh)
    hidden, mask, _ = (tensor.split(LENGTHS, 1)[mesh.get_local_rank()] for tensor in tokens())
    output = layer(hidden.float(), key_padding_mask=mask)
    (WORLD * output.square().sum()).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in layer.named_parameters()}


def test_fully_shard_averages_the_gradients_of_ranks(four):
    layer = make_layer("forget").float()
    hidden, mask, _ = tokens()
    layer(hidden.float(), key_padding_mask=mask).square().sum().backward()
    for gradients in four.run(gradients_of_shards, make_layer("forget").float()):
        assert gradients.keys() == dict(layer.named_parameters()).keys()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


def forgotten(layer):
    mesh = init_device_mesh("cpu", (WORLD,))
    hidden, mask, _ = (tensor.split(LENGTHS, 1)[mesh.get_local_rank()] for tensor in tokens())
    return context_parallel(layer, mesh)(hidden, key_padding_mask=mask, return_state=True)[1].forgotten.detach()


@torch.no_grad()
def test_forgotten_sums_are_those_of_one_process(four):
    hidden, mask, _ = tokens()
    state = make_layer("forget")(hidden, key_padding_mask=mask, return_state=True)[1]
    torch.testing.assert_close(four.run(forgotten, make_layer("forget"))[-1], state.forgotten)


class _Subclass(DynamicMaskAttention):
    pass


def refused():
    mesh = init_device_mesh("cpu", (WORLD,))
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    layer, ends = context_parallel(make_layer("slope"), mesh), torch.tensor([0, 5])
    calls = [
        lambda: context_parallel(nn.Linear(2, 2), mesh),
        lambda: context_parallel(nn.Sequential(_Subclass(32, 4, 2, 8, 6)), mesh),
        lambda: context_parallel(make_layer(None, None, selection="threshold"), mesh),
        lambda: layer(hidden, cu_seqlens=ends),
        lambda: layer(hidden, state=make_layer("slope").empty_state(1)),
        lambda: layer(hidden.expand(1 + mesh.get_local_rank(), 5, 32)),
    ]
    messages = []
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_what_has_no_meaning_is_refused(four):
    assert four.run(refused)[0] == [
        "module: expected a DynamicMaskAttention or a module with some, got Linear",
        "module: expected layers of type DynamicMaskAttention, got _Subclass",
        "window_size: expected an int or one per gate head over several ranks, which it bounds, got None",
        "cu_seqlens: expected None over several ranks (use document_ids), got Tensor",
        "state: expected None over several ranks (use return_state on the last rank), got DynamicMaskState",
        "hidden_states.shape[0]: expected the same on every rank of the mesh, got 1 on this rank, 1 to 4 on all ranks",
    ]


def converted_names():
    mesh = DeviceMesh("cpu", list(range(WORLD)))
    model = nn.Sequential(nn.Linear(32, 32), make_layer("slope"))
    names = list(model.state_dict())
    return names == list(context_parallel(model, mesh).state_dict()), str(model[1]).split("\n")[0]


def test_layers_of_a_model_keep_the_names_of_their_parameters(four):
    same, shown = four.run(converted_names)[0]
    assert same
    assert shown.startswith("ContextParallelDynamicMaskAttention")
