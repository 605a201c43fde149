"""Every decoder family: the converted model equals the original in a window, learns and generates, or is refused."""

import copy
import inspect
import sys

import pytest
import torch
import transformers

from flexdma.integrations.transformers.falcon import REROUTED
from tests.integrations.hf_families import FAMILIES, W, exists, family_model, page_parts, refusal, table
from tests.integrations.hf_models import assert_close, distinct_tokens, in_a_window, padding

from flexdma.integrations.transformers import from_pretrained  # isort: skip

TOKENS = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "no_repeat_ngram_size": 1}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """One thread, because with two these small models mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[family for family in FAMILIES if exists(family)])
def family(request):
    return request.param


def test_it_is_the_original_in_a_window_or_refused(family, tmp_path):
    model, ids = family_model(family), distinct_tokens(2, 20)
    original = copy.deepcopy(model)
    if refusal(model) is not None:
        assert model.state_dict().keys() == original.state_dict().keys()
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
        return
    got, want = model(ids).logits, in_a_window(original, ids, W)
    assert_close(got, want)
    cotangent = torch.randn_like(want)
    got.backward(cotangent)
    want.backward(cotangent)
    for name, weight in original.named_parameters():
        if weight.grad is not None:
            assert_close(model.get_parameter(name).grad, weight.grad, tolerance=1e-4)
    gates = {name: p for name, p in model.named_parameters() if name.endswith("value_gate.A")}
    assert len(gates) == model.config.num_hidden_layers
    assert all(a.grad.abs().max() > 0 for a in gates.values())

    for a in gates.values():
        torch.nn.init.normal_(a)
    prompt, mask = ids[:, :14], padding("left", ids[:, :14])
    want = model.generate(prompt, attention_mask=mask, use_cache=False, **TOKENS)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **TOKENS), want)

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_who_does_not_call_the_interface_is_refused_for_that(family):
    model = family_model(family)
    source = inspect.getsource(sys.modules[type(model).__module__])
    # Falcon's layers do not call the interface; their replacements do.
    calls = "ALL_ATTENTION_FUNCTIONS" in source or any(type(module) in REROUTED for module in model.modules())
    reason = refusal(model) or ""
    said = reason.startswith("model: expected attention layers that call the attention interface")
    assert said == (not calls) or reason.startswith("config.layer_types")


def test_the_table_in_the_docs_is_true():
    _, within, _ = page_parts()
    if f"transformers {'.'.join(transformers.__version__.split('.')[:2])} " not in within:
        pytest.skip("the table is of another transformers")
    assert within == table(), "python -m tests.integrations.hf_families writes it anew"
    assert within.count("\n") >= 42
