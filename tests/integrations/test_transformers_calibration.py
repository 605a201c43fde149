"""Calibrated gates: against dense attention of transformers, and the same regression by another method in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.hf_models import assert_close, causal_lm

from flexdma.integrations.transformers import calibrate, convert_to_dma, from_pretrained, recall_sequences  # isort: skip
from flexdma.integrations.transformers.calibration import future, recall_texts  # isort: skip
from flexdma.integrations.transformers.calibration.budget import divided  # isort: skip
from flexdma.integrations.transformers.calibration.regression import explained_deviance, log_linear, standardized  # isort: skip
from flexdma.tools.long_context.wordings import EVALUATION  # isort: skip
from tests.tools.tiny_models import byte_tokenizer  # isort: skip

FAR, LENGTH, FIRST, LEAST_QUERIES, FLOOR, PENALTY = 6, 72, 8, 16, 1e-4, 100.0


def batches(sizes=(2, 1, 3, 2), length=LENGTH):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 64, (size, length), generator=generator) for size in sizes]


def dense_targets(model, ids, layer, reads_keys):
    """Features [B, n, Hkv F] and peaks [B, n, Hkv] of the sampled keys of each sequence, from transformers' eager attention.

    Keys are those before the rotary embedding: it leaves their energies alone.
    """
    seen: dict = {}
    attention = model.model.layers[layer].self_attn
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        for name in ("k_proj", "v_proj")
    ]
    with torch.no_grad():
        weights = model(ids, output_attentions=True, use_cache=False).attentions[layer].double()
    for handle in handles:
        handle.remove()
    features = seen["v_proj"].unflatten(-1, (2, -1)).double()
    if reads_keys:
        energies = seen["k_proj"].unflatten(-1, (2, 2, -1)).double().square().sum(-2)
        features = torch.cat([features, (energies + 1e-6).log()], -1)
    age = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    groups = weights.masked_fill(age < FAR, 0).unflatten(1, (2, 2))
    peak = groups.amax(dim=(2, 3))
    keys = slice(FIRST, ids.shape[1] - FAR - LEAST_QUERIES)
    return features.flatten(2)[:, keys], peak[:, :, keys].mT


def logarithms_of_expectations(features, peaks, train):
    """The logarithm of the expected peak as a function of features, by L-BFGS in float64."""
    x, y = features[train].flatten(0, 1), peaks[train].flatten(0, 1) + FLOOR
    # All keys decide the units of the penalty.
    mean, deviation = features.mean(dim=(0, 1)), features.flatten(0, 1).std(0, correction=0) + 1e-6
    scaled = (x - mean) / deviation
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    constant = y.mean(0).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, constant], max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logarithm = scaled @ weights + constant
        whole = ((logarithm.exp() - y * logarithm) / y.mean(0)).sum() + PENALTY / 2 * weights.square().sum()
        whole.backward()
        return whole

    optimizer.step(loss)
    return lambda given: (((given - mean) / deviation) @ weights + constant).detach()


@pytest.mark.parametrize(
    ("family", "reads_keys"), [("Llama", False), ("Llama", True), ("Mistral", True), ("Gemma2", False)]
)
def test_gates_windows_and_r_squared_are_those_of_a_dense_regression(family, reads_keys, monkeypatch):
    monkeypatch.setattr(future, "PENALTY", PENALTY)  # few keys
    own = {} if family == "Llama" else {"sliding_window": 20}
    model, texts = causal_lm(family, **own), batches()
    rows = torch.cat(texts)
    layers = [dense_targets(model, rows, layer, reads_keys) for layer in range(2)]
    mean = 5
    found = calibrate(model, texts, window_size=mean, sinks=1, recent=2, far=FAR, decay=0.05, reads_keys=reads_keys)
    held_out = torch.arange(len(rows)) % 5 == 1
    for layer, (values, peaks) in enumerate(layers):
        gate = model.model.layers[layer].self_attn.value_gate
        want = logarithms_of_expectations(values, peaks, torch.ones_like(held_out))(values)
        got = gate(values.unflatten(-1, (2, -1)).transpose(1, 2).float()).detach().double() * 2.0**20
        got = got.mT - 0.05 / torch.tensor(found.windows[layer]) * torch.arange(values.shape[1])[:, None]
        shift = (got - want).mean(dim=(0, 1))
        assert_close(got - shift, want, 1e-4)
        part = logarithms_of_expectations(values, peaks, ~held_out)(values[held_out]).exp().flatten(0, 1)
        truth = peaks[held_out].flatten(0, 1) + FLOOR
        part, truth = part / part.mean(0), truth / truth.mean(0)
        errors, total = ((truth * (truth / m).log() - truth + m).sum(0) for m in (part, torch.ones_like(truth)))
        explained = 1 - errors / total
        torch.testing.assert_close(torch.tensor(found.r_squared[layer]).double(), explained, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            torch.tensor(found.peaks[layer]).double(), peaks.mean(dim=(0, 1)), atol=1e-5, rtol=1e-4
        )
    assert found.tokens == rows.numel()
    assert sum(sum(windows) for windows in found.windows) == mean * 4
    order = torch.tensor(found.peaks).flatten().argsort()
    assert torch.tensor(found.windows).flatten()[order].diff().min() >= 0
    assert model.config.flexdma["window_size"] == found.windows
    assert model.config.flexdma["calibrated"]


def test_outputs_stay_as_they_were_within_the_smallest_window():
    model = causal_lm("Llama")
    ids = batches((2,), 24)[0]
    before = model(ids).logits
    calibrate(model, batches(), window_size=((24, 30), 30), sinks=0, recent=0, far=FAR)
    assert_close(model(ids).logits, before)


def test_given_windows_stay_and_the_model_loads_again(tmp_path):
    model = causal_lm("Qwen3")
    windows: list = [(5, 9), 7]
    found = calibrate(model, batches(), window_size=windows, recent=[2, 3], sinks=1, far=FAR)
    assert found.windows == [[5, 9], [7, 7]]
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    ids = batches((2,))[0]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.flexdma == model.config.flexdma


def test_batches_may_be_mappings_and_an_iterator():
    one, other = causal_lm("Llama"), causal_lm("Llama")
    calibrate(one, batches(), window_size=6, far=FAR)
    mappings = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches())
    calibrate(other, mappings, window_size=6, far=FAR)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        ("training", {}, "model: expected eval mode"),
        ("GptOss", {}, "learned sinks"),
        ("padded", {}, "batches: expected sequences without padding"),
        ("short", {}, "batches: expected sequences of at least 3 far = 18 tokens, got 17"),
        ("floats", {}, "batches: expected token ids"),
        ("one", {}, "batches: expected at least two sequences and 100 keys followed by 22 tokens, got 1 sequences and 42"),
        ("few", {}, "batches: expected at least two sequences and 100 keys followed by 22 tokens, got 2 sequences and 42"),
        ("", {"window_size": [5, (3, 4, 5)]}, r"window_size\[1\]"),
        ("", {"window_size": 0}, "window_size"),
        ("Mistral", {"recent": 7}, "recent: expected at most the model's own sliding window of 6, got 7"),
        ("", {"far": 0}, "far"),
        ("", {"decay": -1.0}, "decay: expected a number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(problem, options, message):
    model = causal_lm(problem if problem[:1].isupper() else "Llama")
    given = batches()
    if problem == "training":
        model.train()
    elif problem == "padded":
        given = [{"input_ids": given[0], "attention_mask": torch.zeros_like(given[0])}]
    elif problem == "short":
        given = [given[0][:, :17]]
    elif problem == "floats":
        given = [given[0].float()]
    elif problem in ("one", "few"):
        given = batches((1,) if problem == "one" else (2,))
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(model, given, **{"window_size": 5, "recent": 2, "far": FAR, **options})
    assert not any(hasattr(module, "value_gate") for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model.config, "flexdma")


def test_a_model_with_infinite_values_is_refused():
    model = causal_lm("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="expected finite values"):
        calibrate(model, batches(), window_size=5, far=FAR)


def test_a_converted_model_is_refused():
    model = convert_to_dma(causal_lm("Llama"), 5)
    with pytest.raises(ValueError, match="not yet converted"):
        calibrate(model, batches(), window_size=5, far=FAR)


def test_keys_that_are_needed_rarely_and_then_entirely_outrank_keys_that_always_get_a_little():
    rare = torch.tensor([0.0, 1.0]).repeat_interleave(2000)
    needed = torch.where(rare == 1, 1e-4, 0.01)
    needed[2000:2100] = 1.0
    x, deviation = standardized(rare[:, None])
    weight = log_linear(x, needed[:, None], 1e-6)[0] / deviation
    # One in twenty is needed: five times as much on average, although the mean of the logarithms is smaller.
    assert needed[2000:].log().mean() < needed[:2000].log().mean()
    torch.testing.assert_close(weight, torch.tensor([((0.05 + 0.95e-4) / 0.01)]).double().log(), atol=1e-5, rtol=0)


def test_targets_that_span_ten_orders_of_magnitude_have_a_fit():
    generator = torch.Generator().manual_seed(0)
    x, _ = standardized(torch.randn(400, 3, generator=generator) * torch.tensor([1.0, 9.0, 0.1]) + 4)
    want = torch.tensor([[4.0], [-3.0], [1.0], [-9.0]])
    targets = (x @ want).exp()
    torch.testing.assert_close(log_linear(x, targets, 1e-6).float(), want, atol=1e-3, rtol=0)
    assert explained_deviance(x, targets, want.double()).item() == pytest.approx(1)
    assert explained_deviance(x, targets, 0 * want.double()).item() == pytest.approx(0)


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    lowest=st.integers(1, 9),
    room=st.lists(st.integers(0, 90), min_size=12, max_size=12),
    part=st.floats(0, 1),
)
def test_a_divided_budget_has_its_sum_and_keeps_bounds_and_order(shares, lowest, room, part):
    highest = torch.tensor([lowest + more for more in room[: len(shares)]])
    total = round(lowest * len(shares) + part * (int(highest.sum()) - lowest * len(shares)))
    sizes = divided(total, torch.tensor(shares, dtype=torch.float64), lowest, highest)
    assert int(sizes.sum()) == total
    assert (sizes >= lowest).all()
    assert (sizes <= highest).all()
    for one, size in zip(shares, sizes.tolist(), strict=True):
        for other, (larger, bound) in zip(shares, zip(sizes.tolist(), highest.tolist(), strict=True), strict=True):
            # One key of difference is a rounding.
            assert not (one < other and size > larger + 1 and larger < bound)


def test_recall_sequences_ask_for_every_fact_and_are_made_by_their_seed():
    tokenizer, text = byte_tokenizer(), "The clerk wrote it down. Nobody asked again. " * 80
    made = list(recall_sequences(tokenizer, text, length=900, count=3, facts=4, seed=5))
    again = list(recall_sequences(tokenizer, text, length=900, count=3, facts=4, seed=5))
    other = next(recall_sequences(tokenizer, text, length=900, count=1, facts=4, seed=6))
    assert all(torch.equal(one, two) for one, two in zip(made, again, strict=True))
    assert not torch.equal(made[0], other)
    for sequence in made:
        assert sequence.shape == (1, 900)
        body, questions = tokenizer.decode(sequence[0], skip_special_tokens=True).split("\n")
        asked = [question for question in questions.split(".") if question]
        assert len(asked) == len({question.rsplit(" ", 1)[0] for question in asked}) == 4
        assert all(f"{question}." in body for question in asked)


def test_recall_sequences_refuse_what_does_not_fit():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="text: expected at least"):
        next(recall_sequences(tokenizer, "short", length=900, count=1, facts=1))
    with pytest.raises(ValueError, match="length: expected enough tokens"):
        next(recall_sequences(tokenizer, "short" * 900, length=60, count=1, facts=4))


def test_layers_that_look_back_no_further_than_far_keep_equal_gates():
    model = causal_lm("Mistral")  # a window of 6
    found = calibrate(model, batches(), window_size=5, recent=0, far=FAR)
    assert found.r_squared == [[0.0, 0.0]] * 2
    assert found.windows == [[5, 5]] * 2


def test_calibration_and_evaluation_have_no_wording_in_common():
    made = {statement for statement, _ in recall_texts.FORMS}
    asked = {wording.statement for wording in EVALUATION.facts} | {
        wording.statement for wording in EVALUATION.pass_keys
    }
    assert not made & {text.split(" {value}")[0] for text in asked}
    names = {name.casefold() for name in (*recall_texts.NAMES, *recall_texts.THINGS, *recall_texts.WORDS)}
    assert not names & {key.casefold() for key in (*EVALUATION.keys, *EVALUATION.fields)}
