"""Needles are functions of their seeds, and likelihoods by chunks are those of all logits at once."""

from typing import Any

import pytest
import torch

from flexdma.tools.long_context.needles import DIGITS, KINDS, PASS_KEY_DIGITS, depths, make_needle, needles
from flexdma.tools.long_context.passes import logits_after, nll_by_position
from flexdma.tools.long_context.wordings import EVALUATION, Wording, Wordings, shared
from tests.tools.tiny_models import TEXT, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
TEXTS = [torch.tensor(TOKENIZER(TEXT)["input_ids"])]
OTHERS = Wordings(
    ("Rain fell.", "Snow fell."), (Wording("Secret {value}.", "Tell it:"),),
    (Wording("{key}, {field}: {value}", "{key}, {field}:"),),
    ("Xaver", "Yolanda", "Zoe", "Willem"), ("shoe size", "bus line", "house", "year"),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wordings", [EVALUATION, OTHERS], ids=["own", "others"])
def test_a_needle_hides_each_value_once_and_asks_for_it(kind, wordings):
    needle = make_needle(TOKENIZER, TEXTS, kind=kind, length=1500, depth=0.3, seed=4, wordings=wordings)
    assert len(needle.context) + len(needle.question) == 1500
    context, question = TOKENIZER.decode(needle.context), TOKENIZER.decode(needle.question)
    assert len(needle.statements) == KINDS[kind]
    assert all(context.count(statement) == 1 for statement in needle.statements)
    assert len(needle.values) == (3 if kind == "values" else 1)
    for value in needle.values:
        assert len(value) == (PASS_KEY_DIGITS if kind == "pass key" else DIGITS)
        assert value in context
        assert value not in question
    scored = TOKENIZER.decode(needle.answer[needle.scored])
    assert scored == "".join(needle.values)  # one token per digit here
    assert TOKENIZER.decode(needle.answer).startswith(needle.values[0])
    asked = next(statement for statement in needle.statements if needle.values[0] in statement)
    assert context.index(asked) / len(context) == pytest.approx(0.3, abs=0.06)


def test_a_needle_depends_on_its_arguments_alone():
    def make(**changes):
        arguments: dict[str, Any] = {"kind": "keys", "length": 1500, "depth": 0.5, "seed": 1} | changes
        return TOKENIZER.decode(make_needle(TOKENIZER, TEXTS, **arguments).ids[0])

    torch.manual_seed(7)
    first = make()
    torch.manual_seed(8)
    assert make() == first
    assert len({first, make(seed=2), make(depth=0.6), make(length=1600), make(kind="values")}) == 5
    assert first.endswith("Marco Rossi was given the account number 5374685")  # in every process and version of Python


def test_statements_begin_where_a_sentence_has_ended():
    needle = make_needle(TOKENIZER, TEXTS, kind="digits", length=1500, depth=0.5, seed=0)
    before = TOKENIZER.decode(needle.context).split(f"\n{needle.statements[0]}\n")[0]
    assert before.endswith((".", "\n"))


def test_the_kinds_are_spread_over_depths():
    assert depths(1) == [0.5]
    assert depths(4) == [0.05, 0.35, 0.65, 0.95]
    made = list(
        needles(TOKENIZER, TEXTS, kinds=["digits", "values"], lengths=[800, 900], depths=depths(2), seeds=[0, 1])
    )
    assert len({(one.kind, one.length, one.depth, one.seed) for one in made}) == 16


def test_wordings_that_share_something_are_found():
    assert shared(EVALUATION, OTHERS) == set()
    assert shared(EVALUATION, Wordings((), (), (), ("ADA MARSH",), ("shoe size",))) == {"Ada Marsh"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "haystack"}, "kind: expected one of pass key, digits, keys, values, got 'haystack'"),
        ({"length": 100}, "length: expected at least "),
        ({"length": 9000}, "texts: expected one of at least "),
        ({"depth": 2}, "depth: expected 0 to 1, got 2"),
    ],
)
def test_a_needle_that_cannot_be_made_is_refused(change, message):
    arguments: dict[str, Any] = {"kind": "keys", "length": 1500, "depth": 0.5, "seed": 1} | change
    with pytest.raises(ValueError, match=message):
        make_needle(TOKENIZER, TEXTS, **arguments)


# Gemma2 caps its logits after the head, Cohere scales them, GPTNeoX names its body differently, OPT calls the decoder in it.
@pytest.mark.parametrize(
    ("family", "config"),
    [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}), ("Cohere", {"logit_scale": 0.2}),
     ("GPTNeoX", {}), ("OPT", {"ffn_dim": 48})],
)  # fmt: skip
def test_likelihoods_by_chunks_are_those_of_all_logits(family, config):
    model = tiny_model(family, **config)
    ids = TEXTS[0][None, :70]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    expected = -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    got = nll_by_position(model, ids, chunk=16)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_after(model, ids, 60, 70).double(), logits[60:], rtol=1e-4, atol=1e-5)
    assert "forward" not in model.base_model.__dict__
