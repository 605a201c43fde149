"""Packed sequences are documents, for each argument that gives them: each sequence alone is the oracle."""

import copy

import pytest
import torch

from tests.integrations.hf_families import family_model, refusal
from tests.integrations.hf_models import CACHE, assert_close, causal_lm, distinct_tokens, doge

import transformers  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma, use_flexdma

LENGTHS = [10, 3, 11]


@pytest.fixture(params=["doge", "llama"])
def model(request):
    if request.param == "doge":
        return use_flexdma(doge())
    model = convert_to_dma(causal_lm("Llama"), 6, recency="slope")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.value_gate.A)
    return model


def collated(ids, **options):
    """The collator's batch of the sequences of LENGTHS."""
    rows = [{"input_ids": row[0]} for row in ids.split(LENGTHS, 1)]
    return dict(transformers.DataCollatorWithFlattening(**options)(rows))


def ends(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def flash(*numbers):
    return {"cu_seq_lens_q": ends(*numbers), "cu_seq_lens_k": ends(*numbers)}


GIVEN = {
    "positions": {},
    "flash": {"return_flash_attn_kwargs": True},
    "flash alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "numbers": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@pytest.mark.parametrize("given", GIVEN)
def test_packed_sequences_are_documents(model, given):
    """Without a cache, with the model's own and with a bounded one; later tokens continue the last document."""
    ids, later = distinct_tokens(1, 24), torch.tensor([[1, 2]])
    apart = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    batch, cache = collated(ids, **GIVEN[given]), DynamicMaskCache()
    assert_close(model(**batch, use_cache=False).logits, apart)
    assert_close(model(**batch).logits, apart)
    assert_close(model(**batch, **{CACHE: cache}).logits, apart)
    positions = torch.tensor([[11, 12]]) if "position_ids" in batch else None
    got = model(later, position_ids=positions, **{CACHE: cache}).logits
    assert_close(got, model(torch.cat([ids[:, -LENGTHS[-1] :], later], 1)).logits[:, -2:])


@pytest.mark.parametrize("use_cache", [False, True])
def test_rows_may_restart_at_different_places(model, use_cache):
    """Also by position in the call, and in the model inside, which PEFT calls."""
    ids = distinct_tokens(2, 12)
    apart = [torch.cat([model(part).logits for part in ids[row : row + 1].split(sizes, 1)], 1)
             for row, sizes in enumerate([[5, 7], [12]])]  # fmt: skip
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    assert_close(model(ids, None, positions, use_cache=use_cache).logits, torch.cat(apart))
    inside = model.model(ids, position_ids=positions, use_cache=use_cache).last_hidden_state
    assert_close(model.lm_head(inside), torch.cat(apart))


def test_positions_beside_a_mask_are_no_documents(model):
    """Padding repeats positions.  Transformers detects no packing beside a mask."""
    ids = distinct_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(got[:1, 5:], model(ids[:1, 5:]).logits)


# They pass to attention: keywords but no positions; positions but no keywords; both, but none to the mask.
@pytest.mark.parametrize("family", ["BioGpt", "Falcon", "GptOss"])
def test_families_that_detect_no_packing_themselves(family):
    model = family_model(family)
    assert refusal(model) is None
    ids = distinct_tokens(1, 24)
    apart = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    for use_cache in (False, True):
        assert_close(model(**collated(ids), use_cache=use_cache).logits, apart)


@pytest.mark.parametrize("given", ["positions", "numbers"])
def test_a_growing_cache_does_not_go_on(model, given):
    """It keeps no documents, so later tokens would see all sequences."""
    cache = transformers.DynamicCache()
    model(**collated(distinct_tokens(1, 24), **GIVEN[given]), **{CACHE: cache})
    with pytest.raises(ValueError, match="cache: expected DynamicMaskCache to continue packed sequences"):
        model(torch.tensor([[1]]), **{CACHE: cache})


def padded(rows):
    """A collator that pads instead of packing; each sequence's first token is no target, as when packed."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, beyond = row["input_ids"], longest - len(row["input_ids"])
        batch["input_ids"].append(ids + [0] * beyond)
        batch["attention_mask"].append([1] * len(ids) + [0] * beyond)
        batch["labels"].append([-100, *ids[1:], *[-100] * beyond])
    return {name: torch.tensor(numbers) for name, numbers in batch.items()}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_trainer_learns_from_packed_sequences_as_from_padded_ones(tmp_path, checkpoints):
    def trained(collator):
        torch.manual_seed(0)
        model = convert_to_dma(causal_lm("Llama"), 6, recency="slope")
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.value_gate.A)
        if checkpoints:  # by its name from 5.23 on, or before
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=3, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
            remove_unused_columns=False,
        )  # fmt: skip
        rows = [{"input_ids": row[0].tolist()} for row in distinct_tokens(1, 24).split(LENGTHS, 1)]
        transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
        return model.state_dict()

    want = trained(padded)
    for options in ({}, {"return_flash_attn_kwargs": True}):
        got = trained(transformers.DataCollatorWithFlattening(**options))
        for name, tensor in got.items():
            assert_close(tensor, want[name])


@pytest.mark.parametrize("given", ["positions", "flash"])
@torch.no_grad()
def test_documents_compile(model, given):
    batch = collated(distinct_tokens(1, 24), **GIVEN[given])
    compiled, want = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), model(**batch).logits
    assert_close(compiled(**batch, use_cache=False).logits, want)
    cache = transformers.DynamicCache()
    assert_close(compiled(**batch, **{CACHE: cache}).logits, want)
    if given == "flash":
        with pytest.raises(ValueError, match="cache: expected DynamicMaskCache to continue packed sequences"):
            model(torch.tensor([[1]]), **{CACHE: cache})


@torch.no_grad()
def test_a_compiled_model_goes_on_after_positions_that_do_not_restart(model):
    """While compiling they cannot be read, and may be packed."""
    ids, cache = distinct_tokens(1, 24), transformers.DynamicCache()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled(ids, position_ids=torch.arange(24)[None], **{CACHE: cache})
    got = model(torch.tensor([[1]]), **{CACHE: cache}).logits
    assert_close(got, model(torch.cat([ids, torch.tensor([[1]])], 1)).logits[:, -1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": ends(0, 8)}, r"cu_seq_lens_k: expected a tensor \[2\], got NoneType"),
        ({"cu_seq_lens_k": ends(0, 8)}, r"cu_seq_lens_q: expected a tensor \[N \+ 1\], got NoneType"),
        ({"cu_seq_lens_q": ends(0, 5, 8), "cu_seq_lens_k": ends(0, 4, 8)}, "cu_seq_lens_k: expected cu_seq_lens_q"),
        (flash(0, 5, 7), r"cu_seq_lens_q: expected growing numbers from 0 to 8 tokens, got \[0, 5, 7\]"),
        (flash(0, 5, 3, 8), "cu_seq_lens_q: expected growing numbers from 0 to 8 tokens"),
        ({"cu_seq_lens_q": torch.rand(2)}, "cu_seq_lens_q: expected torch.int32 or torch.int64, got torch.float32"),
        ({**flash(0, 5, 8), "seq_idx": torch.arange(8)[None]}, "seq_idx: expected the same documents as cu_seq_lens_q"),
        ({"seq_idx": ends(0, 0, 1)[None]}, r"seq_idx: expected \[1, 8\], got \[1, 3\]"),
        (
            {**flash(0, 5, 8), "position_ids": torch.arange(4).repeat(2)[None]},
            "position_ids: expected consecutive positions in each document",
        ),
    ],
)
def test_documents_that_do_not_fit_are_refused(model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model(distinct_tokens(1, 8), **arguments, use_cache=False)


def test_positions_that_restart_after_others_are_refused(model):
    cache = DynamicMaskCache()
    model(distinct_tokens(1, 8), **{CACHE: cache})
    with pytest.raises(ValueError, match="position_ids: expected consecutive positions with a cache that is not empty"):
        model(distinct_tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), **{CACHE: cache})


def test_documents_of_many_rows_or_after_others_are_refused(model):
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected all sequences in one row, got 2 rows"):
        model(distinct_tokens(2, 4), **flash(0, 4))
    cache = DynamicMaskCache()
    model(distinct_tokens(1, 8), **{CACHE: cache})
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None with a cache that is not empty, got it after 8"):
        model(distinct_tokens(1, 4), **flash(0, 4), **{CACHE: cache})
