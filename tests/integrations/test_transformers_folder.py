"""The saved folder of a converted model is an ordinary one: Auto classes, pipelines, adapters and Trainer take it."""

import copy
import json
import runpy
import sys
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.integrations.hf_folders import converted, folder, tokenizer
from tests.integrations.hf_models import SIZES, distinct_tokens

import accelerate  # isort: skip  # after hf_models, which keeps transformers offline
import peft  # isort: skip
import transformers  # isort: skip
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # isort: skip
import flexdma  # isort: skip
from flexdma.integrations.transformers import convert_to_dma, from_pretrained  # isort: skip

MODULE = "modeling_flexdma.py"


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch, tmp_path):
    """The folder to which transformers copies modules before it imports them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder."""
    return folder(tmp_path_factory.mktemp("saved") / "model")


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)


def contents(path):
    """The files of a model, without the tokenizer's."""
    own = [MODULE, "config.json", "generation_config.json", *(file.name for file in path.glob("model*"))]
    return {name: (path / name).read_bytes() for name in own}


def gate_dtypes(model):
    return {p.dtype for name, p in model.named_parameters() if "value_gate" in name}


# Qwen3Moe has other names of weights in files than in the model.
@pytest.mark.parametrize(("family", "options"), [("Gemma2", {"sliding_window": 12}), ("Qwen3Moe", {})])
def test_auto_classes_load_the_converted_model(family, options, tmp_path):
    model, ids = converted(family, **options), distinct_tokens(2, 24)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 2
    again = load(tmp_path / "one")
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "two")  # transformers divides a loaded model into shards in another order
    again.save_pretrained(tmp_path / "three")
    assert contents(tmp_path / "two") == contents(tmp_path / "three")


def test_both_ways_to_load_write_the_same_folder_again(saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "auto")
    from_pretrained(saved).save_pretrained(tmp_path / "own")
    assert contents(tmp_path / "auto") == contents(tmp_path / "own") == contents(saved)
    other = load(saved)
    changed = copy.deepcopy(other)
    changed.lm_head.weight.data.zero_()
    changed.save_pretrained(tmp_path / "changed")  # the copy, not the model that it was copied from
    assert not load(tmp_path / "changed").lm_head.weight.any()
    assert other.lm_head.weight.any()


def test_an_upload_has_the_module(saved):
    # transformers uploads the files that are newer than in this list.
    assert MODULE not in load(saved)._get_files_timestamps(saved)


def test_a_folder_from_before_loads_as_well(saved, tmp_path):
    model = from_pretrained(saved)
    model.save_pretrained(tmp_path)
    (tmp_path / MODULE).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = distinct_tokens(1, 24)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_options_of_loading_are_kept(saved, tmp_path):
    want, ids = from_pretrained(saved), distinct_tokens(1, 24)
    half = load(saved, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert gate_dtypes(half) == {torch.float32}
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {f"model.{name}": "disk" if name == "layers.1" else "cpu" for name in names} | {"lm_head": "cpu"}
    offloaded = load(saved, device_map=places, offload_folder=tmp_path)
    assert offloaded.model.layers[1].self_attn.value_gate.A.is_meta
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, want(ids).logits)
    model, info = load(saved, output_loading_info=True)
    assert type(model) is type(want)
    assert not info["missing_keys"]
    config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in want.named_parameters()}
    # transformers serve and TRL load a model by the first architecture.
    first = getattr(transformers, config.architectures[0]).from_pretrained(saved, trust_remote_code=True)
    assert torch.equal(first(ids).logits, want(ids).logits)
    with pytest.raises(ValueError, match="attn_implementation: expected None or 'flexdma', got 'sdpa'"):
        load(saved, attn_implementation="sdpa")


def test_without_trust_transformers_loads_no_gates(saved):
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not gate_dtypes(model)
    assert len(info["unexpected_keys"]) == len([n for n in from_pretrained(saved).state_dict() if "value_gate" in n])


def test_a_pipeline_generates_what_the_model_does(saved):
    words, prompt = AutoTokenizer.from_pretrained(saved, trust_remote_code=True), "the quick brown fox"
    pipeline = transformers.pipeline("text-generation", str(saved), trust_remote_code=True, device="cpu")
    got = pipeline(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = words(prompt, return_tensors="pt").input_ids
    want = from_pretrained(saved).generate(ids, max_new_tokens=20, do_sample=False)
    assert got == tokenizer().decode(want[0, ids.shape[1] :], skip_special_tokens=True)


def trainer(model, path, steps):
    rows = [{"input_ids": row, "labels": row} for row in distinct_tokens(8, 24)]
    arguments = transformers.TrainingArguments(
        str(path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_steps=2, disable_tqdm=True, dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows)


def test_training_goes_on_from_a_checkpoint(saved, tmp_path):
    whole = load(saved)
    trainer(whole, tmp_path / "whole", 4).train()
    trainer(load(saved), tmp_path / "halves", 2).train()
    resumed = trainer(load(saved), tmp_path / "halves", 4)
    resumed.train(resume_from_checkpoint=True)
    want = whole.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    again = load(tmp_path / "halves" / "checkpoint-4").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in want.items())
    assert (tmp_path / "halves" / "checkpoint-4" / MODULE).read_bytes() == (saved / MODULE).read_bytes()


def test_an_adapter_finds_the_folder(saved, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["value_gate"], task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(load(saved), lora), distinct_tokens(1, 24)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        want = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)
        merged: Any = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, want)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_continuous_batching_is_refused_by_name(saved):
    with pytest.raises(
        NotImplementedError, match="continuous batching: expected a cache that keeps every key in pages"
    ):
        load(saved).generate_batch([[5, 6, 7]], max_new_tokens=3)


def test_the_folder_names_the_package_that_it_needs(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flexdma, "__version__", "0.0.9")
        with pytest.raises(ImportError, match=r"expected 0.1.0 or newer, got 0.0.9; pip install 'flexdma\[trans"):
            load(saved)
        patch.setitem(sys.modules, "flexdma", None)
        with pytest.raises(ImportError, match=r"expected 0.1.0 or newer, got none; pip install 'flexdma\[trans"):
            load(saved)
    assert Version(runpy.run_path(str(saved / MODULE))["NEEDED"]) <= Version(flexdma.__version__)


def test_every_auto_class_finds_the_gates(saved, tmp_path):
    model, ids = from_pretrained(saved), distinct_tokens(1, 24)
    with torch.no_grad():
        want = model.model(ids)[0]
    base = transformers.AutoModel.from_pretrained(saved, trust_remote_code=True)
    base.save_pretrained(tmp_path / "base")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True)
    classifier.save_pretrained(tmp_path / "classifier")
    for made in (
        base,
        from_pretrained(tmp_path / "base"),
        classifier.model,
        from_pretrained(tmp_path / "classifier").model,
    ):
        assert isinstance(made, transformers.LlamaModel)
        with torch.no_grad():
            assert torch.equal(made(ids)[0], want)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["architectures"], min(config["flexdma"]["value_heads"])) == (["LlamaModel"], "layers.0.self_attn")


def test_a_class_that_is_not_of_transformers_keeps_its_own_files(tmp_path):
    class Custom(transformers.LlamaForCausalLM):
        """As a model that transformers loaded with code of its own."""

    config = transformers.LlamaConfig(**SIZES, auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"})
    model = convert_to_dma(Custom(config), 5)
    with pytest.warns(UserWarning, match="save_pretrained: Custom is no class of transformers"):
        model.save_pretrained(tmp_path)
    assert model.config.auto_map == {"AutoModelForCausalLM": "modeling_custom.Custom"}
    with pytest.raises(
        ValueError, match=r"config.architectures: expected the name of a model class of transformers, got"
    ):
        from_pretrained(tmp_path)
