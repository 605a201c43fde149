"""Packed sequences are documents, for each argument that gives them: each sequence alone is the oracle."""

import copy

import pytest
import torch

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
    ids = distinct_tokens(1, 24)
    apart = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    batch = collated(ids, **GIVEN[given])
    assert_close(model(**batch, use_cache=False).logits, apart)
    if given != "positions":  # with a cache transformers does not read them
        assert_close(model(**batch).logits, apart)
        assert_close(model(**batch, **{CACHE: DynamicMaskCache()}).logits, apart)
    else:
        with pytest.raises(ValueError, match="position_ids: expected consecutive positions with a cache"):
            model(**batch)


def test_the_last_document_goes_on(model):
    ids = distinct_tokens(1, 24)
    cache = DynamicMaskCache()
    model(**collated(ids, return_flash_attn_kwargs=True), **{CACHE: cache})
    later, last = torch.tensor([[1, 2]]), ids[:, -LENGTHS[-1] :]
    got = model(later, position_ids=torch.tensor([[11, 12]]), **{CACHE: cache}).logits
    assert_close(got, model(torch.cat([last, later], 1)).logits[:, -2:])


def test_a_growing_cache_does_not_go_on(model):
    """It keeps no documents, so later tokens would see all sequences."""
    cache = transformers.DynamicCache()
    model(**collated(distinct_tokens(1, 24), return_seq_idx=True, return_position_ids=False), **{CACHE: cache})
    with pytest.raises(ValueError, match="cache: expected DynamicMaskCache to continue packed sequences"):
        model(torch.tensor([[1]]), **{CACHE: cache})


def test_trainer_takes_what_the_collator_makes(tmp_path):
    def trained(use_cache, **options):
        model = convert_to_dma(causal_lm("Llama", use_cache=use_cache), 6)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=3, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row[0].tolist()} for row in distinct_tokens(1, 24).split(LENGTHS, 1)]
        collator = transformers.DataCollatorWithFlattening(**options)
        transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
        return model.state_dict()

    want, got = trained(use_cache=False), trained(use_cache=True, return_flash_attn_kwargs=True)
    for name, tensor in got.items():
        assert_close(tensor, want[name])


@torch.no_grad()
def test_documents_compile(model):
    batch = collated(distinct_tokens(1, 24), return_flash_attn_kwargs=True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_close(compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)
    cache = transformers.DynamicCache()
    assert_close(compiled(**batch, **{CACHE: cache}).logits, model(**batch, use_cache=False).logits)
    with pytest.raises(ValueError, match="cache: expected DynamicMaskCache to continue packed sequences"):
        model(torch.tensor([[1]]), **{CACHE: cache})


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


def test_documents_of_many_rows_or_after_others_are_refused(model):
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected all sequences in one row, got 2 rows"):
        model(distinct_tokens(2, 4), **flash(0, 4))
    cache = DynamicMaskCache()
    model(distinct_tokens(1, 8), **{CACHE: cache})
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None with a cache that is not empty, got it after 8"):
        model(distinct_tokens(1, 4), **flash(0, 4), **{CACHE: cache})
