"""Decoders with gates: they start as a sliding window, learn (also with Trainer and PEFT), and can be loaded again."""

import copy

import pytest
import torch

from tests.integrations.hf_models import (
    FAMILIES,
    assert_close,
    causal_lm,
    distinct_tokens,
    doge,
    gates,
    in_a_window,
    padding,
)

import accelerate  # isort: skip
import peft  # isort: skip  # after hf_models, which keeps transformers offline
import transformers  # isort: skip
from flexdma.integrations.transformers import convert_to_dma, from_pretrained

W = 6


@pytest.mark.parametrize("recency", [None, "slope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_original_in_a_sliding_window(family, recency):
    original, ids = causal_lm(family), distinct_tokens(2, 24)
    want = in_a_window(original, ids, W)
    model = convert_to_dma(copy.deepcopy(original), W, recency=recency)
    assert_close(model(ids).logits, want)
    # With a context not longer than w it equals the original.
    assert_close(model(ids[:, :W]).logits, original(ids[:, :W]).logits)
    if family != "Mistral":  # whose own window this is
        assert (original(ids).logits - want).abs().max() > 0.1
    padded = model(ids, attention_mask=padding("left", ids)).logits[0, 5:]
    assert_close(padded, in_a_window(original, ids[:1, 5:], W)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gates_learn(family):
    model, ids = convert_to_dma(causal_lm(family), W, recency="slope"), distinct_tokens(2, 24)
    model(ids, labels=ids).loss.backward()
    learning = {name for name, p in gates(model).items() if p.grad.abs().max() > 0}
    # dt_proj has no gradient while A is 0.
    assert learning == {name for name in gates(model) if name.endswith((".A", ".slope"))}


@pytest.mark.slow
def test_a_softcap_is_computed_in_one_graph_too():
    model, ids = convert_to_dma(causal_lm("Gemma2"), W), distinct_tokens(2, 24)
    want = model(ids, labels=ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got = compiled(ids, labels=ids, use_cache=False)
    assert_close(got.loss, want.loss)
    got.loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in gates(model).items() if name.endswith(".A"))
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, want.logits)
    uncapped = causal_lm("Gemma2", attn_logit_softcapping=None)
    assert (in_a_window(uncapped, ids, W) - want.logits).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_their_names_and_values(family):
    original = causal_lm(family)
    model = convert_to_dma(copy.deepcopy(original), W)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    added = set(model.state_dict()) - set(original.state_dict())
    assert added == set(gates(model))
    assert len(added) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_with_its_gates(family, dtype, tmp_path):
    model, ids = convert_to_dma(causal_lm(family).to(dtype), W, recency="forget", sinks=1), distinct_tokens(1, 24)
    for parameter in gates(model).values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.flexdma == model.config.flexdma
    want = model.state_dict()
    assert again.state_dict().keys() == want.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == want[name].dtype == (torch.float32 if "value_gate" in name else dtype)
        assert torch.equal(tensor, want[name])
    if dtype == torch.float32:
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_without_the_sizes_of_values_loads_as_well(tmp_path):
    model, ids = convert_to_dma(causal_lm("Qwen3Moe"), W), distinct_tokens(1, 24)
    del model.config.flexdma["value_heads"]
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_meta_gets_the_same_gates(family):
    with torch.device("meta"):
        model = convert_to_dma(causal_lm(family), W)
    want = convert_to_dma(causal_lm(family), W)
    assert model.config.flexdma == want.config.flexdma
    assert {name: p.shape for name, p in gates(model).items()} == {name: p.shape for name, p in gates(want).items()}
    assert all(p.is_meta for p in gates(model).values())


def test_an_offloaded_model_is_converted_too():
    model, ids = causal_lm("Llama"), distinct_tokens(1, 24)
    want = convert_to_dma(copy.deepcopy(model), W)(ids).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    got = convert_to_dma(model, W)(ids).logits
    assert torch.equal(got, want)
    assert not any(p.is_meta for p in gates(model).values())


def test_looking_at_a_model_leaves_it_as_it_was():
    model = causal_lm("DiffLlama").train()
    model.model.norm.eval()
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(
        TypeError, match="call the attention interface once, got DiffLlamaAttention, which calls it twice"
    ):
        convert_to_dma(model, W)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config._attn_implementation == "eager"


def test_loading_refuses_what_has_no_gates(tmp_path):
    model = causal_lm("Llama")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"config.flexdma: expected what convert_to_dma writes.*got a plain llama"):
        from_pretrained(tmp_path / "plain")
    model.config.flexdma = convert_to_dma(causal_lm("Llama"), W).config.flexdma
    model.save_pretrained(tmp_path / "hollow")
    with pytest.raises(ValueError, match="expected the weights of all gates"):
        from_pretrained(tmp_path / "hollow")


def trained(model, folder, steps=2):
    rows = [{"input_ids": row, "labels": row} for row in distinct_tokens(4, 24)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    return model.eval()


def test_trainer_trains_the_gates(tmp_path):
    model = trained(convert_to_dma(causal_lm("Llama"), W), tmp_path)
    assert all(p.abs().min() > 0 for name, p in gates(model).items() if name.endswith(".A"))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_peft_trains_gates_and_adapters(targets, tmp_path):
    ids, original = distinct_tokens(2, 24), causal_lm("Llama")
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["value_gate"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(convert_to_dma(copy.deepcopy(original), W), config)
    trained(model, tmp_path)
    assert all(
        p.abs().min() > 0 for name, p in gates(model).items() if "modules_to_save" in name and name.endswith(".A")
    )
    with torch.no_grad():  # a loaded adapter is not trainable, and calls without gradients take another path
        want = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(convert_to_dma(copy.deepcopy(original), W), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, want)
    assert_close(model.merge_and_unload()(ids).logits, want)


def test_an_adapter_on_the_gate_itself_is_not_ignored(tmp_path):
    model = convert_to_dma(causal_lm("Llama"), W)
    for parameter in gates(model).values():
        torch.nn.init.normal_(parameter)
    model, ids = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dt_proj"])), distinct_tokens(1, 24)
    model(ids, labels=ids).loss.backward()
    adapters = {name: p.grad for name, p in gates(model).items() if "lora_B" in name}
    assert all(gradient.abs().max() > 0 for gradient in adapters.values())


def with_a_recurrence():
    """A Llama whose layer keeps a running sum, which no cache holds."""
    model = causal_lm("Llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden, plain=mlp.forward: plain(hidden.cumsum(1))
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (doge, {}, TypeError, "expected a model without gates, got DogeForCausalLM; use_flexdma"),
        (lambda: convert_to_dma(causal_lm("Llama"), W), {}, ValueError, "expected one not yet converted"),
        (
            lambda: causal_lm("Mistral"),
            {"window_size": 7},
            ValueError,
            "at most the model's own sliding window of 6, got 7",
        ),
        (
            lambda: causal_lm("DiffLlama"),
            {},
            TypeError,
            "expected layers that call the attention interface once, got DiffLlamaAttention, which calls it twice",
        ),
        (
            lambda: causal_lm("GPTNeo", attention_types=[[["global", "local"], 1]]),
            {},
            TypeError,
            "attention layers that call the attention interface, got GPTNeoForCausalLM",
        ),
        (
            with_a_recurrence,
            {},
            TypeError,
            "expected attention as the only operation across tokens, got LlamaForCausalLM",
        ),
        (lambda: causal_lm("Llama"), {"window_size": 0}, ValueError, "window_size: expected at least 1, got 0"),
        (lambda: causal_lm("Llama"), {"recency": "last"}, ValueError, "recency: expected one of"),
        (
            lambda: causal_lm("Llama"),
            {"recency_ranks": False},
            ValueError,
            "recency_ranks: expected True with recency=None",
        ),
        (lambda: torch.nn.Linear(1, 1), {}, TypeError, "expected a transformers PreTrainedModel, got Linear"),
    ],
)
def test_what_cannot_be_converted_is_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        convert_to_dma(make(), **{"window_size": W, **options})


def test_an_encoder_decoder_is_refused():
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=8, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(TypeError, match="model: expected"):
        convert_to_dma(transformers.BartForConditionalGeneration(config), W)
