"""The bounded cache: the same tokens as the original model and as a growing cache, in memory that does not grow."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.integrations.hf_models import CACHE, assert_close, causal_lm, distinct_tokens, doge, padding

import transformers  # isort: skip  # after hf_models, which keeps it offline
from transformers import DynamicCache, StaticCache  # isort: skip
from flexdma.integrations.transformers import DynamicMaskCache, attention, convert_to_dma, use_flexdma

# No token twice: gates of equal tokens are equal in the first layer up to rounding, which depends on the tokens in a pass.
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "no_repeat_ngram_size": 1}
# (recency, recency_ranks)
RECENCIES = [(None, True), ("slope", True), ("forget", True), ("slope", False), ("forget", False)]


def tokens(model, ids, side="none", **options):
    return model.generate(ids, attention_mask=padding(side, ids), **{**GREEDY, **options})


def gated(family="Llama", window_size=6, **options):
    """A converted model whose gates differ, with slopes of about 0.1 per token."""
    model = convert_to_dma(causal_lm(family), window_size, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("value_gate.A"):
            torch.nn.init.normal_(parameter)
        if name.endswith("value_gate.slope"):
            torch.nn.init.uniform_(parameter, 0.05, 0.2)
    return model


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("beams", [1, 3])
def test_doge_generates_what_the_shipped_model_does(side, beams):
    shipped, ids = doge(), distinct_tokens(2, 16)
    model = use_flexdma(copy.deepcopy(shipped))
    want = tokens(shipped, ids, side, num_beams=beams)
    assert torch.equal(tokens(model, ids, side, num_beams=beams), want)
    assert torch.equal(tokens(model, ids, side, num_beams=beams, cache_implementation="dynamic"), want)


@pytest.mark.parametrize(("recency", "ranks"), RECENCIES)
def test_a_converted_model_generates_the_same_with_either_cache(recency, ranks):
    model = gated(recency=recency, recency_ranks=ranks, reads_keys=recency == "slope")
    ids = distinct_tokens(2, 16)
    want = tokens(model, ids, "left", use_cache=False)
    assert torch.equal(tokens(model, ids, "left"), want)
    assert torch.equal(tokens(model, ids, "left", cache_implementation="dynamic"), want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("recency", "ranks"), RECENCIES)
def test_reading_copying_and_recording_between_tokens_change_nothing(recency, ranks, mode):
    options = {"recency": recency, "recency_ranks": ranks, "reads_keys": recency is not None}
    model = gated(sinks=2, window_size=[6, (2, 9)], recent=[0, 4], **options)
    ids = distinct_tokens(2, 40)
    with mode():
        want = model(ids, use_cache=False).logits
        cache = DynamicMaskCache()
        model(ids[:, :10], **{CACHE: cache})
        for at in range(10, 40):
            if at == 16:
                state: Any = cache.layers[0].state
                assert state.length.tolist() == [16, 16]
            if at == 22:
                before, cache = cache, copy.deepcopy(cache)
                for _ in range(2):  # the copy does not see these tokens
                    model(ids[:, 39:], **{CACHE: before})
            if at == 30:
                cache.activate_past_recording()
            if at == 34:
                cache.crop(-4)
                for again in range(30, 34):
                    model(ids[:, again : again + 1], **{CACHE: cache})
            logits = model(ids[:, at : at + 1], **{CACHE: cache}).logits
            assert_close(logits[:, -1], want[:, at])


@pytest.mark.parametrize(("recency", "ranks"), RECENCIES[1:])
def test_a_recency_that_is_trained_alone_has_gradients_through_decoded_tokens(recency, ranks):
    model, ids, cache = gated(recency=recency, recency_ranks=ranks), distinct_tokens(1, 16), DynamicMaskCache()
    with torch.no_grad():
        model(ids[:, :14], **{CACHE: cache})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("slope" in name or "forget_proj" in name)
    model(ids[:, 14:15], **{CACHE: cache})
    model(ids[:, 15:], **{CACHE: cache}).logits.square().sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)


def test_prefill_in_chunks_and_speculation_change_nothing():
    model, ids = use_flexdma(doge()), distinct_tokens(1, 16)
    want = tokens(model, ids)
    assert torch.equal(tokens(model, ids, prefill_chunk_size=5), want)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # so that most of its proposals are rejected
    assert torch.equal(tokens(model, ids, assistant_model=assistant), want)


@pytest.mark.parametrize("make", [lambda: use_flexdma(doge()), gated])
def test_static_is_a_word_for_the_bounded_cache(make):
    model, ids = make(), distinct_tokens(2, 16)
    options = {"return_dict_in_generate": True, "cache_implementation": "static"}
    got = tokens(model, ids, "left", **options)
    assert isinstance(got[CACHE], DynamicMaskCache)
    assert torch.equal(got.sequences, tokens(model, ids, "left", use_cache=False))
    chunks = tokens(model, ids, "left", **options, prefill_chunk_size=5)
    assert torch.equal(chunks.sequences, got.sequences)


@torch.no_grad()
def test_its_keys_and_values_can_be_read():
    model, ids = gated(), distinct_tokens(2, 16)
    cache, growing = DynamicMaskCache(), DynamicCache()
    model(ids[:, :1], **{CACHE: cache})
    layers: list[Any] = cache.layers  # whose keys and values are no longer None
    first = layers[0]
    assert first.keys.shape == first.values.shape == (2, 2, 6, 8)
    model(ids[:, 1:], **{CACHE: cache})
    model(ids, **{CACHE: growing})
    for layer, every in zip(layers, growing.layers, strict=True):
        slots = layer.state.position[..., None].expand_as(layer.keys)
        assert_close(layer.keys, every.keys.gather(2, slots))
        assert_close(layer.values, every.values.gather(2, slots))
    cache.reset()
    assert first.keys is first.values is None


def test_a_conversation_goes_on_from_its_cache():
    model, (ids, later) = use_flexdma(doge()), distinct_tokens(1, 19).split([16, 3], 1)
    first = tokens(model, ids, return_dict_in_generate=True, suppress_tokens=later[0].tolist())
    more = torch.cat([first.sequences, later], 1)
    assert torch.equal(tokens(model, more, **{CACHE: first[CACHE]}), tokens(model, more))


@torch.no_grad()
def test_its_memory_does_not_grow_with_the_context():
    model = use_flexdma(doge())
    cache = DynamicMaskCache()
    sizes = []
    for _ in range(6):
        model(distinct_tokens(2, 50), **{CACHE: cache})
        sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 300
    assert len(set(sizes)) == 1
    keys_and_values = 2 * 2 * 2 * 2 * 5 * 8 * 4  # layers, key and value, rows, heads, w, D, bytes
    assert keys_and_values < sizes[0] < 3 * keys_and_values


@torch.no_grad()
def test_its_rows_can_be_chosen_and_repeated():
    model, ids = use_flexdma(doge()), distinct_tokens(2, 12)
    cache = DynamicMaskCache()
    model(ids[:, :8], **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 1, 0]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    got = model(ids.flip(0)[:, 8:], **{CACHE: cache}).logits
    assert_close(got, model(ids.flip(0)).logits[:, 8:])


@pytest.mark.parametrize("make", [lambda: use_flexdma(doge()), gated])
@torch.no_grad()
def test_another_batch_size_is_refused(make):
    model, ids, cache = make(), distinct_tokens(3, 8), DynamicMaskCache()
    model(ids[:2], **{CACHE: cache})
    with pytest.raises(
        ValueError, match="cache: expected one of batch size 3, as the tokens have, got one of batch size 2"
    ):
        model(ids[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_a_cache_without_rows_goes_on(count):
    model, ids, cache = use_flexdma(doge()), distinct_tokens(2, 12), DynamicMaskCache()
    model(ids[:, :8], **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([False, False]))
    assert model(ids[:0, :count], **{CACHE: cache}).logits.shape == (0, count, 64)
    assert cache.get_seq_length() == 8 + count


@pytest.mark.parametrize("removed", [1, 5, 8])  # a whole forward pass, a part of the one before, all of them
@torch.no_grad()
def test_it_can_be_rolled_back_exactly_if_it_recorded_the_past(removed):
    model, ids = gated(recency="forget", reads_keys=True), distinct_tokens(1, 24)
    cache = DynamicMaskCache()
    model(ids[:, :16], **{CACHE: cache})
    cache.activate_past_recording()
    for part in ids[:, 16:].split([6, 1, 1], 1):
        model(part, **{CACHE: cache})
    cache.crop(-removed)
    assert cache.get_seq_length() == 24 - removed
    got = model(ids[:, -removed:], **{CACHE: cache}).logits
    assert_close(got, model(ids).logits[:, -removed:])


@torch.no_grad()
def test_a_rollback_that_cannot_be_exact_is_refused():
    model, ids = use_flexdma(doge()), distinct_tokens(1, 24)
    cache = DynamicMaskCache()
    model(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="expected a rollback past no eviction"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="expected a number <= 0"):
        cache.crop(4)


@torch.no_grad()
def test_a_reset_cache_is_empty():
    model, ids = use_flexdma(doge()), distinct_tokens(1, 24)
    cache = DynamicMaskCache()
    want = model(ids, **{CACHE: cache}).logits
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert torch.equal(model(ids, **{CACHE: cache}).logits, want)


@torch.no_grad()
def test_a_model_without_flexdma_cannot_use_it():
    model, ids, cache = doge(), distinct_tokens(1, 8), DynamicMaskCache()
    model(ids, **{CACHE: cache})
    with pytest.raises(RuntimeError, match="expected a model of use_flexdma or convert_to_dma"):
        model(ids, **{CACHE: cache})


def test_a_layer_that_attends_twice_is_noticed(monkeypatch):
    model, ids = convert_to_dma(causal_lm("Llama"), 6), distinct_tokens(1, 24)
    # A layer that called the interface once when it was converted.
    attend = attention.attention_interface

    def twice(*arguments, **named):
        attend(*arguments, **named)
        return attend(*arguments, **named)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flexdma", twice)
    with pytest.raises(RuntimeError, match="expected one attention after each update of a layer, got one without"):
        tokens(model, ids)


def test_a_layer_attends_to_the_keys_of_its_update():
    def attend(count):
        query, key = torch.zeros(1, 2, count, 4), torch.zeros(1, 1, count, 4)
        options = {"window_size": 3, "sinks": 0, "recent": 0, "key_padding_mask": None, "document_ids": None}
        cache.attend(0, query, key, key, lambda value, **_: value.sum(-1), **options)

    cache = DynamicMaskCache()
    with pytest.raises(RuntimeError, match="got one without an update"):
        attend(2)
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(RuntimeError, match="expected attention to the 2 keys of the last update, got 3"):
        attend(3)
    attend(2)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_in_the_backward_is_noticed(reentrant):
    model, ids, cache = use_flexdma(doge()), distinct_tokens(1, 24), DynamicMaskCache()
    with torch.no_grad():
        model(ids[:, :16], **{CACHE: cache})  # from here on its tensors keep their shapes
    embedded = model.model.embed_tokens(ids[:, 16:])
    logits = checkpoint(lambda x: model(inputs_embeds=x, **{CACHE: cache}).logits, embedded, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="cache: expected None under activation checkpointing, got DynamicMaskCache"):
        logits.sum().backward()


@pytest.mark.parametrize("passes", [0, 1])  # before the interrupted one
@torch.no_grad()
def test_a_forward_pass_that_did_not_end_is_noticed_by_the_next(passes):
    model, ids, cache = use_flexdma(doge()), distinct_tokens(1, 24), DynamicMaskCache()
    for _ in range(passes):
        model(ids[:, :8], **{CACHE: cache})
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 8:16], **{CACHE: cache})
    hook.remove()
    with pytest.raises(
        RuntimeError, match=f"expected layer 1 after {8 * passes + 8} tokens.*got it after {8 * passes}"
    ):
        model(ids[:, 8:16], **{CACHE: cache})
    cache.reset()
    assert torch.equal(model(ids, **{CACHE: cache}).logits, model(ids, **{CACHE: DynamicMaskCache()}).logits)


def test_other_caches_are_refused():
    model, ids = use_flexdma(doge()), distinct_tokens(1, 8)
    with pytest.raises(ValueError, match=r"cache_implementation: expected None or 'static'.*got 'offloaded_static'"):
        tokens(model, ids, cache_implementation="offloaded_static")
    static = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(TypeError, match="expected DynamicMaskCache or DynamicCache, got StaticCache"):
        tokens(model, ids, **{CACHE: static})


@torch.no_grad()
def test_a_cache_that_drops_keys_by_age_is_refused():
    model, ids = gated("Mistral"), distinct_tokens(1, 16)
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    with pytest.raises(ValueError, match="cache: expected all 17 keys, got 6"):
        model(ids[:, :1], **{CACHE: cache})
    assert tokens(model, ids).shape == (1, 28)
