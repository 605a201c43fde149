"""Distillation: the teacher is the original model, gates learn its attention, adapters its predictions, windows shrink."""

import copy
import math
import re
from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integrations.hf_models import assert_close, causal_lm

import transformers  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import DistillTrainer, convert_to_dma, distill, from_pretrained  # isort: skip
from flexdma.integrations.transformers.eligibility import UNBOUNDED, attention_calls, own_windows  # isort: skip
from flexdma.integrations.transformers.full_attention import full_attention  # isort: skip
from flexdma.integrations.transformers.future_peaks import future_peaks, sampled_keys  # isort: skip

FAR = 8
WINDOWS: list[Any] = [[6, 12], 9]
OPTIONS: dict[str, Any] = {"form": "linear", "recency": "slope", "sinks": 2, "recent": 4}
# transformers 5.23 renamed a method that peft and older versions call by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def converted(*, reads_keys=False, **config):
    return convert_to_dma(causal_lm("Llama", **config), WINDOWS, **OPTIONS, reads_keys=reads_keys)


def batches(count=6, rows=2, length=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, 64, (count, rows, length), generator=generator))


def distilled(model, given=None, **options):
    return distill(model, batches() if given is None else given, **{"far": FAR, "gate_lr": 1e-2, "lr": 1e-2, **options})


def kl(original, model, ids):
    """KL(original || model) per token by the logits of all tokens."""
    with torch.no_grad():
        p, q = (each(ids, use_cache=False).logits.double().log_softmax(-1) for each in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def dense_peaks(original, ids, far, heads=2):
    """Per layer max P_hij [B, heads, K] over queries i >= j + far and the query heads of a group, of eager attention."""
    position = torch.arange(ids.shape[1])
    counted = (position[:, None] - position) >= far
    with torch.no_grad():
        weights = original(ids, output_attentions=True).attentions
    return [(w.unflatten(1, (heads, -1)).amax(2) * counted).amax(2) for w in weights]


@pytest.mark.parametrize(("family", "config"), [("Llama", {}), ("GPTNeoX", {}), ("Mistral", {"sliding_window": 14}),
                                                ("Gemma2", {"sliding_window": 14})])  # fmt: skip
def test_the_teacher_is_the_original_model(family, config):
    original, ids, peaks = causal_lm(family, **config), batches(1)[0], {}
    model = convert_to_dma(copy.deepcopy(original), 6, form="linear")
    own = own_windows(attention_calls(model))
    for layer in own:
        layer.value_gate.A.data.fill_(1.0)
    with full_attention(model, lambda seen: peaks.update({seen.layer: future_peaks(seen, FAR)}), own):
        logits = model(ids, use_cache=False).logits
    heads = 4 if family == "GPTNeoX" else 2
    for layer, want in zip(own, dense_peaks(original, ids, FAR, heads), strict=True):
        assert_close(peaks[layer], want)
    assert_close(logits, original(ids, use_cache=False).logits)
    if family in ("Llama", "GPTNeoX"):
        original.set_attn_implementation("sdpa")
        assert torch.equal(logits, original(ids, use_cache=False).logits)
    windows = {"Mistral": [14, 14], "Gemma2": [14, UNBOUNDED]}.get(family, [UNBOUNDED] * 2)
    assert list(own.values()) == windows
    assert (model(ids, use_cache=False).logits - logits).abs().max() > 0.1  # in its windows again


def test_logits_in_chunks_are_those_of_the_family(monkeypatch):
    # Softcaps of logits, scaled logits, experts, and a decoder inside the base model.
    monkeypatch.setattr("flexdma.integrations.transformers.distillation.divergence.CHUNK", 10)
    ids = batches(1, length=36)[0]
    for family, config in (
        ("Gemma2", {}),
        ("Cohere", {}),
        ("Qwen3Moe", {}),
        ("OPT", {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}),
    ):
        original = causal_lm(family, **config)
        model = convert_to_dma(copy.deepcopy(original), 5, form="identity")
        want = kl(original, model, ids)
        assert want > 1e-3
        assert distilled(model, [ids], anneal=0.0).divergence == pytest.approx([want], rel=1e-4)


def with_a_future_in_the_values():
    """A model whose tokens differ in how much attention they get, which their values have as a number."""
    model = causal_lm("Llama", num_hidden_layers=1, rope_theta=1e12)
    torch.manual_seed(1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.model.embed_tokens.weight[:, 1].normal_(0.0, 2.0)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(0.1)
        attention.q_proj.weight[3::8, 0] = 2.0  # dimension 3 hardly turns with position
        attention.k_proj.weight[3::8, 1] = 2.0
        attention.v_proj.weight[::8, 1] = 1.0
    return model


def rank_correlations(model, original, ids):
    """Per head the correlation of ranks between gates and the dense mass of the keys that the loss samples."""
    attention, values = model.model.layers[0].self_attn, []
    hook = attention.value_gate.register_forward_pre_hook(lambda gate, given: values.append(given[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
        gates = attention.value_gate(values[0])
    hook.remove()
    keys = sampled_keys(ids.shape[1], FAR)
    ranks = [x[..., keys].argsort(-1).argsort(-1).double() for x in (gates, dense_peaks(original, ids, FAR)[0])]
    left, right = ((rank - rank.mean(-1, keepdim=True)).transpose(0, 1).flatten(1) for rank in ranks)
    return (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1))


def test_gates_learn_what_the_full_model_looks_back_at():
    original = with_a_future_in_the_values()
    model = convert_to_dma(copy.deepcopy(original), [WINDOWS[0]], **OPTIONS)
    ids = batches(1, rows=8, length=96, seed=1)[0]
    before = kl(original, model, ids)
    record = distilled(model, batches(20, rows=4, length=96), steps=40, gate_lr=5e-2)
    assert record.ranking[-1] < record.ranking[0] / 3
    assert (rank_correlations(model, original, ids) > 0.8).all()
    assert kl(original, model, ids) < before / 10
    assert len(record.divergence) == 40
    assert record.tokens == 40 * 4 * 96


@pytest.mark.parametrize("reads_keys", [False, True])
def test_all_weights_but_those_of_dt_proj_stay(reads_keys):
    model = converted(reads_keys=reads_keys)
    model.model.norm.weight.requires_grad_(False)
    gate = model.model.layers[1].self_attn.value_gate
    with torch.no_grad():
        gate.A[1], gate.slope[:] = 0.5, 1e-3
    before = copy.deepcopy(model.state_dict())
    record = distilled(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "value_gate." not in name)
    changed = {name.rpartition("value_gate.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"dt_proj.weight", "A"}
    assert model.model.layers[0].self_attn.value_gate.A.tolist() == [2.0**-20] * 2
    assert gate.A.tolist() == [2.0**-20, 0.5]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert not any(module.training for module in model.modules())
    assert record.model is model
    assert model.config.flexdma["distilled"] is True


def test_heads_with_constant_gates_start_as_a_window():
    model, ids = converted(), batches(1)[0]
    want = kl(causal_lm("Llama"), model, ids)
    record = distilled(model, [ids], anneal=0.0)
    assert record.divergence[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_adapters_learn_the_predictions():
    model, original, ids = converted(), causal_lm("Llama"), batches(2)[0]
    before = kl(original, model, ids)
    base = copy.deepcopy(model.state_dict())
    record = distilled(model, batches(2), steps=30, gates=False, lora=8, anneal=0.0)
    assert record.ranking == []
    assert record.divergence[-1] < 0.8 * record.divergence[1]
    assert kl(original, model, ids) < 0.8 * before
    # The adapters are in the weights of attention, and nothing else is left of them.
    assert list(model.state_dict()) == list(base)
    changed = {name for name in base if not torch.equal(model.state_dict()[name], base[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    distilled(model, steps=1, lora=2)


def test_each_step_compares_with_the_original_model():
    original, model, want = causal_lm("Llama"), converted(), []

    def watched():
        for ids in batches():
            want.append(kl(original, model, ids))  # with the adapters as they are
            yield ids

    record = distilled(model, watched(), steps=6, lora=4, anneal=0.0)
    assert record.divergence == pytest.approx(want, rel=1e-4)
    assert len(set(want)) == 6


def test_unmerged_adapters_are_saved_with_the_gates(tmp_path):
    model, ids = converted(reads_keys=True), batches(1)[0]
    before = copy.deepcopy(model.state_dict())
    record = distilled(model, lora=peft.LoraConfig(r=2, target_modules=["v_proj"]), merge=False)
    want = record.model(ids, use_cache=False).logits
    record.model.save_pretrained(tmp_path)
    again = converted(reads_keys=True)
    again.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(again.eval()(ids, use_cache=False).logits, want)
    merged = record.model.merge_and_unload()
    assert merged is model
    # Queries that see all earlier keys: merging rounds values, and nearly equal gates may then be in another order.
    sees_all = min(WINDOWS[0])
    assert_close(model(ids, use_cache=False).logits[:, :sees_all], want[:, :sees_all])


# Losses of one step after others: equal if all gradients so far were.
@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpointing_changes_nothing(lora):
    want = distilled(converted(), lora=lora)
    for reentrant in (False, True):
        model = converted()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = distilled(model, lora=lora)
        assert got.divergence == pytest.approx(want.divergence, rel=1e-4, abs=1e-6)
        assert got.ranking == pytest.approx(want.ranking, rel=1e-4)


@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_bfloat16(lora):
    want = distilled(converted(), lora=lora)
    model = converted().bfloat16()
    for layer in model.model.layers:
        layer.self_attn.value_gate.float()
    got = distilled(model, lora=lora)
    assert model.model.layers[0].self_attn.v_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cast = distilled(converted(), lora=lora)
    for record in (got, cast):
        assert record.divergence == pytest.approx(want.divergence, rel=0.1, abs=5e-3)
        assert record.ranking == pytest.approx(want.ranking, rel=0.05)


def trainer(folder, model, steps=6, options=None, **arguments):
    rows = [{"input_ids": row} for batch in batches() for row in batch]
    given = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, optim="adamw_torch",
        lr_scheduler_type="cosine", warmup_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    return _InOrder(model, given, train_dataset=rows, far=FAR, gate_lr=1e-2, **(options or {}))


class _InOrder(DistillTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("lora", [None, 4])
def test_the_trainer_computes_what_the_loop_does(lora, tmp_path):
    model, options = converted(), {"lora": lora}
    want = distilled(converted(), lora=lora, warmup=1 / 6)
    whole = trainer(tmp_path, model, options=options, save_strategy="steps", save_steps=3, logging_steps=1)
    whole.train()
    got = whole.distillation
    assert got.divergence == pytest.approx(want.divergence, rel=1e-3, abs=1e-6)
    assert got.ranking == pytest.approx(want.ranking, rel=1e-4)
    assert got.windows == want.windows
    logged = [entry["divergence"] for entry in whole.state.log_history if "loss" in entry]
    assert logged == got.divergence
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config.flexdma["distilled"] is True

    resumed = trainer(tmp_path, converted(), options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.distillation.divergence == pytest.approx(got.divergence[3:], rel=1e-5)
    assert resumed.distillation.windows == got.windows[3:]
    resumed.save_model(str(tmp_path / "saved"))
    ids = batches(1)[0]
    again = from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids, use_cache=False).logits, resumed.model.eval()(ids, use_cache=False).logits)
    with pytest.raises(RuntimeError, match="train: expected one call"):
        resumed.train()


def test_the_trainer_casts_and_accumulates(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        want = distilled(converted(), lora=4, warmup=1 / 6)
    cast = trainer(tmp_path, converted(), options={"lora": 4}, bf16=True, gradient_checkpointing=True)
    cast.train()
    assert cast.distillation.divergence == pytest.approx(want.divergence, rel=0.02, abs=1e-3)
    model = converted()
    halves = trainer(tmp_path, model, 3, gradient_accumulation_steps=2, eval_strategy="no")
    halves.train()
    assert len(halves.distillation.divergence) == 6
    other = converted()
    distilled(other, [torch.cat(pair) for pair in zip(batches()[::2], batches()[1::2], strict=True)], warmup=1 / 3)
    for layer, its in zip(model.model.layers, other.model.layers, strict=True):
        assert_close(layer.self_attn.value_gate.dt_proj.weight, its.self_attn.value_gate.dt_proj.weight, 1e-3)
    assert trainer(tmp_path, model).evaluate(halves.train_dataset)["eval_loss"] > 0


def test_windows_shrink_along_half_a_cosine():
    seen = []
    model = converted()
    layers = [layer.self_attn for layer in model.model.layers]
    hook = layers[0].value_gate.register_forward_pre_hook(
        lambda *_: seen.append([layer.dynamic_mask_options["window_size"] for layer in layers])
    )
    record = distilled(model, steps=28, anneal=0.5)
    hook.remove()
    rests = [(1 + math.cos(math.pi * level / 7)) / 2 for level in range(7)]
    shrinking = [
        [(6 + round(rest * 58), 12 + round(rest * 52)), 9 + round(rest * 55)] for rest in rests for _ in range(2)
    ]
    assert seen[::2] == [*shrinking, *[[(6, 12), 9]] * 14]  # the loss calls each gate again
    assert record.windows[0] == 64.0
    assert record.windows[-1] == 9.0


def test_windows_stay_in_the_models_own():
    model = convert_to_dma(causal_lm("Gemma2", sliding_window=20), 6, form="linear", recent=3)
    record = distilled(model, anneal=1.0)
    assert record.windows[0] == (17 + 64) / 2
    assert record.divergence[0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("lora", [None, 4])
def test_an_interruption_leaves_the_final_windows(lora, tmp_path):
    def interrupted():
        yield from ({"input_ids": ids} for ids in batches(2))
        raise KeyboardInterrupt

    model = converted()
    names, choice = list(model.state_dict()), dict(model.config.flexdma)
    with pytest.raises(KeyboardInterrupt):
        distilled(model, interrupted(), steps=20, lora=lora)
    assert_left_in_order(model, names, choice | {"distilled": True})
    model = converted()
    training = trainer(tmp_path, model, options={"lora": lora})
    training.get_train_dataloader = interrupted
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert_left_in_order(model, names, choice | {"distilled": True})
    with pytest.raises(ValueError, match="expected 20 batches"):
        distilled(converted(), iter(batches(2)), steps=20)
    model = converted()
    with pytest.raises(ValueError, match="batches: expected no labels"):
        distilled(model, [{"input_ids": batches(1)[0], "labels": batches(1)[0]}], lora=lora)
    assert_left_in_order(model, names, choice)


def assert_left_in_order(model, names, choice):
    assert [layer.self_attn.dynamic_mask_options["window_size"] for layer in model.model.layers] == [(6, 12), 9]
    assert model.config.flexdma == choice
    assert model.config._attn_implementation == "flexdma"
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_no_tensor_has_the_size_of_queries_by_keys(lora):
    length = 2048  # blocks of scores have up to 2 ** 20 numbers per thread
    model = converted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with _Largest() as largest:
        distilled(model, batches(1, rows=1, length=length), lora=lora)
    assert largest.elements < length * length


IDS = batches(1)[0]
REFUSED_BATCHES = {
    "batches: expected no labels": {"input_ids": IDS, "labels": IDS},
    "batches: expected input_ids and attention_mask alone.*got past_key_values": {
        "input_ids": IDS,
        "past_key_values": 1,
    },
    "batches: expected sequences without padding": {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
    "batches: expected input_ids .B, N. int64, got .2, 64. of torch.float32": IDS.float(),
    "batches: expected input_ids .B, N. int64, got NoneType": {},
    "batches: expected sequences of at least 33 tokens with far=8, got 20": IDS[:, :20],
}


@pytest.mark.parametrize("message", REFUSED_BATCHES)
def test_batches_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        distilled(converted(), [REFUSED_BATCHES[message]])


def test_what_cannot_be_distilled_is_refused_by_name(monkeypatch):
    def refuse(error, message, model, given=None, **options):
        with pytest.raises(error, match=message):
            distilled(model, given, **options)

    plain = causal_lm("Llama")
    refuse(TypeError, "model: expected one converted by convert_to_dma", plain)
    refuse(TypeError, "model: expected a converted model of transformers, got Linear", torch.nn.Linear(1, 1))
    refuse(TypeError, "model: expected a causal language model.*LlamaModel", convert_to_dma(plain, 4).model)
    refuse(ValueError, "form 'linear' or 'identity', got 'exp'", convert_to_dma(causal_lm("Llama"), 4))
    forgets = convert_to_dma(causal_lm("Llama"), 4, form="linear", recency="forget")
    refuse(ValueError, "recency None or 'slope', got 'forget'", forgets)
    below = converted()
    with torch.no_grad():
        below.model.layers[0].self_attn.value_gate.A[0] = -1.0
    refuse(ValueError, "gates with A >= 0, got A = -1", below)
    dropout = convert_to_dma(causal_lm("GPTNeoX", hidden_dropout=0.1), 4, form="linear")
    refuse(ValueError, r"no dropout or noise.*got gpt_neox.*\.p = 0\.1", dropout)
    sinks = convert_to_dma(causal_lm("GptOss"), 4, form="linear")
    refuse(ValueError, "model: expected attention without learned sinks", sinks)
    wide = convert_to_dma(causal_lm("Llama"), 62, form="linear", sinks=2)
    refuse(ValueError, "longer than the 64 keys that every head keeps, got 64 tokens", wide)
    model = converted()
    refuse(ValueError, "gates, lora: expected at least one to train", model, gates=False)
    refuse(ValueError, "anneal: expected a share", model, anneal=1.5)
    refuse(ValueError, "warmup: expected a share", model, warmup=10)
    refuse(TypeError, "steps: expected a number", model, iter(batches()))
    refuse(TypeError, "lora: expected a rank, a LoraConfig or None, got 'all'", model, lora="all")
    refuse(ValueError, "lora: expected a rank of at least 1, got 0", model, lora=0)
    for options in ({"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(target_modules=["q_proj"], **options)
        refuse(ValueError, "lora: expected adapters alone", model, lora=config)
    head = peft.LoraConfig(target_modules=["lm_head"])
    refuse(ValueError, "lora: expected adapters inside the body of the model", model, lora=head)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refuse(ImportError, re.escape("lora: expected peft to be installed"), model, lora=4)
    assert_left_in_order(model, list(converted().state_dict()), converted().config.flexdma)
