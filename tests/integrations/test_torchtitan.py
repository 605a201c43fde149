"""Dynamic Mask Attention as torchtitan's inner attention; the oracles are the dense specification and documents alone."""

import importlib
import importlib.util
import itertools
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexdma.gates import FORGET_BIAS, ValueGate
from flexdma.reference import dense_dynamic_mask_attention
from tests.integrations.fake_torchtitan import torchtitan_or_stand_in

installed = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs torchtitan")
ENDS = [0, 7, 19, 24]  # of documents in two rows of 12 tokens


@pytest.fixture(scope="module", autouse=True)
def titan():
    with torchtitan_or_stand_in():
        integration = importlib.import_module("flexdma.integrations.torchtitan")
        attention = importlib.import_module("torchtitan.models.common.attention")
        yield SimpleNamespace(**{name: getattr(integration, name) for name in integration.__all__}, **vars(attention))


def inner(titan, **options):
    config = titan.DynamicMaskInnerAttention.Config(
        **{"window_size": 4, "recent": 1, "recency": "slope", "n_kv_heads": 2, "head_dim": 8} | options
    )
    made = config.build().double()
    with torch.no_grad():  # a gate of A = 0 is a sliding window
        made.gate.A.copy_(torch.tensor([1.5, -2.0]))
    return made


def heads(rows=2, length=12, dtype=torch.float64):
    return [torch.randn(rows, length, count, 8, dtype=dtype, requires_grad=True) for count in (4, 2, 2)]


def metadata(titan, ends):
    ends = torch.tensor(ends, dtype=torch.int32)
    return titan.VarlenMetadata(ends, ends, 12, 12)


def specification(module, query, key, value, **options):
    """The dense specification of rows [B, L, N, H], with the gates of a `ValueGate` that has the weights of the module's."""
    gate = ValueGate(2, 8, recency="slope").double()
    gate.load_state_dict(module.gate.state_dict())
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    options = {"window_size": 4, "recent": 1} | options
    gates, bias = (gate(value), None) if module.recency_ranks else gate(value, return_recency=True)
    return dense_dynamic_mask_attention(query, key, value, gates, bias=bias, **options).transpose(1, 2)


def assert_equal_with_gradients(got, want, leaves):
    cotangent = torch.randn_like(got)
    pairs = [(got, want)]
    pairs += zip(*(torch.autograd.grad(each, leaves, cotangent) for each in (got, want)), strict=True)
    for a, b in pairs:  # gates are float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


def test_rows_are_the_specification(titan):
    module, tensors = inner(titan), heads()
    got = module(*tensors, scale=0.3, enable_gqa=True)
    assert got.is_contiguous()
    assert_equal_with_gradients(got, specification(module, *tensors, scale=0.3), tensors)


@pytest.mark.parametrize("flat", [False, True], ids=["BLNH", "TNH"])
def test_each_document_is_computed_alone(titan, flat):
    module, tensors = inner(titan), heads()
    joined = [each.flatten(0, 1) for each in tensors]
    got = module(*(joined if flat else tensors), attention_masks=metadata(titan, ENDS))
    assert got.shape == (joined[0] if flat else tensors[0]).shape
    alone = [
        specification(module, *(each[None, first:last] for each in joined))[0]
        for first, last in itertools.pairwise(ENDS)
    ]
    assert_equal_with_gradients(got.reshape(24, 4, 8), torch.cat(alone), tensors)


def test_a_recency_may_be_added_without_ranking(titan):
    module, tensors = inner(titan, recency_ranks=False), heads()
    assert_equal_with_gradients(module(*tensors), specification(module, *tensors), tensors)
    got = module(*tensors, attention_masks=metadata(titan, [0, 12, 24]))
    assert_equal_with_gradients(got, specification(module, *tensors), tensors)
    with pytest.raises(ValueError, match="recency_ranks: expected True with recency=None"):
        inner(titan, recency=None, recency_ranks=False)


def test_the_window_may_be_set_between_calls(titan):
    module, rows = inner(titan), heads()
    assert module.window_size == 4
    module.window_size = 2
    assert_equal_with_gradients(module(*rows), specification(module, *rows, window_size=2), rows)
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        module.window_size = 0
    assert module.window_size == 2


def test_tokens_without_documents_are_one(titan):
    module, tensors = inner(titan), heads(rows=1)
    got = module(*(each[0] for each in tensors))
    torch.testing.assert_close(got, specification(module, *tensors)[0], rtol=1e-5, atol=5e-6)


def test_the_gate_trains_and_initialises_itself(titan):
    module = inner(titan, recency="forget")
    assert set(module.state_dict()) == {f"gate.{name}" for name in ValueGate(2, 8, recency="forget").state_dict()}
    module(*heads()).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.gate.parameters())
    with torch.device("meta"):
        module = inner(titan, recency="forget")
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    module.init_states()
    assert module.gate.A.tolist() == [1, 1]
    assert module.gate.forget_proj.bias.tolist() == [FORGET_BIAS] * 2
    bound = 16**-0.5  # that of nn.Linear
    assert all(
        0 < weight.abs().max() <= bound for weight in (module.gate.dt_proj.weight, module.gate.forget_proj.weight)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_kv_heads": None}, ValueError, "n_kv_heads, head_dim: expected those of the attention, got None and 8"),
        ({"window_size": 0}, ValueError, "window_size: expected"),
        ({"window_size": [4, 4, 4]}, ValueError, "window_size: expected"),
        ({"form": "tanh"}, ValueError, "form: expected"),
        ({"lowering": "eager"}, ValueError, "lowering: expected"),
        ({"param_init": {}}, ValueError, "param_init: expected None"),
    ],
)
def test_wrong_options_are_refused_where_it_is_built(titan, options, error, message):
    with pytest.raises(error, match=message):
        inner(titan, **options)


def test_wrong_calls_are_refused(titan):
    module, tensors = inner(titan), heads()
    with pytest.raises(TypeError, match="attention_masks: expected VarlenMetadata or None, got BlockMask"):
        module(*tensors, attention_masks=type("BlockMask", (), {})())
    with pytest.raises(NotImplementedError, match="out_transform: expected None"):
        module(*tensors, out_transform=lambda output, lse: output)
    with pytest.raises(ValueError, match=r"query: expected \[B, L, N, H\] or \[T, N, H\], got \[12, 8\]"):
        module(*(each[0, :, 0] for each in tensors))
    masks = metadata(titan, ENDS)
    masks = masks._replace(cu_seq_k=masks.cu_seq_k[:-1])
    with pytest.raises(ValueError, match="cu_seq_q and cu_seq_k, got 3 and 2"):
        module(*tensors, attention_masks=masks)
    with pytest.raises(ValueError, match="value: expected"):  # half of the heads, as tensor parallel would have
        module(*(each[:, :, ::2] for each in tensors))


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 2}, "tensor_parallel_degree: expected 1, .* got 2"),
        ({"cp": 4}, "context_parallel_degree: expected 1, .* got 4"),
        ({"spmd_backend": "full_dtensor"}, "spmd_backend: expected 'spmd_types' or 'partial_dtensor'"),
    ],
)
def test_parallelism_that_the_gate_cannot_have_is_refused(titan, degrees, message):
    dims = SimpleNamespace(**{"tp": 1, "cp": 1, "spmd_backend": "spmd_types"} | degrees)
    with pytest.raises(NotImplementedError, match=message):
        inner(titan).parallelize(dims)


def test_the_converter_gives_each_attention_its_sizes(titan):
    @dataclass(kw_only=True, slots=True)
    class Model(titan.DynamicMaskConverter.Config):  # type: ignore[name-defined]
        layers: list
        inner_attention: object = None

    full, windowed = (
        titan.VarlenAttention.Config(sharding_config="by heads"),
        titan.VarlenAttention.Config(window_size=(9, 0)),
    )
    converter = titan.DynamicMaskConverter.Config(
        inner_attention=titan.DynamicMaskInnerAttention.Config(window_size=4, recency="slope")
    ).build()

    def attention(**sizes):
        return attention_config(titan, **{"n_heads": 4, "dim": 64, "inner_attention": full} | sizes)

    model = converter.convert(Model(layers=[attention(), attention(n_kv_heads=2, head_dim=8)]))
    made = [layer.inner_attention for layer in model.layers]
    assert [(each.n_kv_heads, each.head_dim, each.window_size) for each in made] == [(4, 16, 4), (2, 8, 4)]
    assert [each.sharding_config for each in made] == ["by heads"] * 2
    assert all(isinstance(each, titan.VarlenAttention.Config) for each in made)  # so the model makes documents for it
    with pytest.raises(
        ValueError, match=r"layers.1.inner_attention: expected full causal attention, got window_size=\(9, 0\)"
    ):
        converter.convert(Model(layers=[attention(), attention(inner_attention=windowed)]))
    with pytest.raises(ValueError, match=r"layers.0: expected a GQAttention, got BaseAttention"):
        converter.convert(Model(layers=[titan.BaseAttention.Config(n_heads=4, inner_attention=full)]))
    with pytest.raises(ValueError, match="model_config: expected attentions in it, got none"):
        converter.convert(Model(layers=[]))


def attention_config(titan, **sizes):
    names = titan.GQAttention.Config.__dataclass_fields__
    return titan.GQAttention.Config(**{name: None for name in ("qkv_linear", "wo", "rope") if name in names} | sizes)


def test_without_torchtitan_the_import_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flexdma.integrations.torchtitan")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(
        ImportError, match=r"torchtitan: expected to be installed, got none; pip install 'flexdma\[torchtitan\]'"
    ):
        importlib.import_module("flexdma.integrations.torchtitan")


@pytest.fixture
def llama():
    """A small Llama of torchtitan's with flexdma, made as its trainer makes it, with gates that select."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "torchtitan_llama.py"))
    config = example["with_flexdma"](8, recency="slope")
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    model.init_states()
    with torch.no_grad():
        for layer in model.layers.values():
            layer.attention.inner_attention.gate.A.normal_()
    return model


def two_documents(model):
    """Tokens [2, 24] whose second row has two documents, their positions, and torchtitan's masks for them."""
    positions = torch.arange(24).repeat(2, 1)
    positions[1, 10:] -= 10
    return torch.randint(256, (2, 24)), positions, model.get_attention_masks(positions)


@installed
def test_a_model_of_torchtitan_keeps_documents_apart(llama):
    tokens, positions, masks = two_documents(llama)
    got = llama(tokens, positions, masks)
    for row, first, last in ((0, 0, 24), (1, 0, 10), (1, 10, 24)):
        torch.testing.assert_close(
            got[row, first:last], llama(tokens[row : row + 1, first:last])[0], rtol=1e-4, atol=1e-5
        )
    got.square().mean().backward()
    gates = [layer.attention.inner_attention.gate for layer in llama.layers.values()]
    assert all(parameter.grad.abs().sum() > 0 for gate in gates for parameter in gate.parameters())


@pytest.mark.slow
@installed
@pytest.mark.filterwarnings("ignore")  # of torchtitan and FSDP
def test_a_model_is_sharded_compiled_and_checkpointed_as_torchtitan_does(llama, monkeypatch):
    config = importlib.import_module("torchtitan.config")
    dims = importlib.import_module("torchtitan.distributed.parallel_dims")
    llama3 = importlib.import_module("torchtitan.models.llama3")
    checkpointing = importlib.import_module("torchtitan.distributed.activation_checkpoint")
    monkeypatch.setattr(dims, "device_type", "cpu")
    tokens, positions, masks = two_documents(llama)
    want = llama(tokens, positions, masks)
    want.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    parallelism = config.ParallelismConfig()
    sharded_config = llama.config
    sharded_config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_dims = dims.ParallelDims(
            dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1, spmd_backend=parallelism.spmd_backend
        )
        parallel_dims.build_mesh()
        sharded = llama3.parallelize_llama(
            sharded_config.build(),
            parallel_dims=parallel_dims,
            training=config.TrainingConfig(mixed_precision_param="float32"),
            parallelism=parallelism,
            compile_config=config.CompileConfig(enable=True),
            ac_config=checkpointing.FullAC.Config(),
            dump_folder="",
        )
        sharded.init_states()
        with torch.no_grad():
            for name, parameter in sharded.named_parameters():
                parameter.to_local().copy_(weights[name.replace("_checkpoint_wrapped_module.", "")])
        got = sharded(tokens, positions, masks)
        got.square().mean().backward()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for name, parameter in sharded.named_parameters():
            reached = gradients[name.replace("_checkpoint_wrapped_module.", "")]
            torch.testing.assert_close(parameter.grad.full_tensor(), reached, rtol=1e-3, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()
