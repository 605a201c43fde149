"""Calibrated gates: against dense attention of transformers, and the same regression by another method in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.hf_models import assert_close, causal_lm

from flexdma.integrations.transformers import calibrate, convert_to_dma, from_pretrained, recall_sequences  # isort: skip
from flexdma.integrations.transformers.calibration import future, recall_texts  # isort: skip
from flexdma.integrations.transformers.calibration.budget import divided  # isort: skip
from flexdma.integrations.transformers.calibration.window_errors import Looks, window_errors  # isort: skip
from flexdma.integrations.transformers.calibration.regression import explained_deviance, log_linear, standardized  # isort: skip
from flexdma.integrations.transformers.full_attention import full_attention  # isort: skip
from flexdma.reference import dense_visibility  # isort: skip
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
def test_gates_and_r_squared_are_those_of_a_dense_regression(family, reads_keys, monkeypatch):
    monkeypatch.setattr(future, "PENALTY", PENALTY)  # few keys
    own = {} if family == "Llama" else {"sliding_window": 20}
    model, texts = causal_lm(family, **own), batches()
    rows = torch.cat(texts)
    layers = [dense_targets(model, rows, layer, reads_keys) for layer in range(2)]
    mean = 5
    found = calibrate(model, texts, window_size=mean, sinks=1, recent=2, far=FAR, slopes=[0.05], reads_keys=reads_keys)
    held_out = torch.arange(len(rows)) % 5 == 1
    for layer, (values, peaks) in enumerate(layers):
        gate = model.model.layers[layer].self_attn.value_gate
        want = logarithms_of_expectations(values, peaks, torch.ones_like(held_out))(values)
        got = gate(values.unflatten(-1, (2, -1)).transpose(1, 2).float()).detach().double() * 2.0**20
        got = got.mT - 0.025 * torch.arange(values.shape[1])[:, None]
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
        ("Mistral", {"recent": 7}, "recent: expected less than the model's own sliding window of 6, got 7"),
        ("", {"far": 0}, "far"),
        ("", {"slopes": [0.1, -1.0]}, r"slopes: expected a sequence of numbers >= 0, got \[0.1, -1.0\]"),
        ("", {"slopes": 0.1}, "slopes: expected a sequence of numbers >= 0, got 0.1"),
        ("", {"slopes": []}, "slopes: expected a sequence of numbers >= 0, got"),
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


@settings(max_examples=40, deadline=None)
@given(
    falls=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3),
    own=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    part=st.floats(0, 1),
)
def test_a_divided_budget_has_its_sum_within_bounds_and_the_least_error(falls, own, part):
    sizes, highest = [1, 3, 6], torch.tensor(own[: len(falls)])
    errors = torch.tensor([[sum(head[size:]) for size in range(3)] for head in falls]).double().T
    total = round(len(falls) + part * (int(highest.sum()) - len(falls)))
    windows = divided(total, sizes, errors, highest)
    assert int(windows.sum()) == total
    assert (windows >= 1).all()
    assert (windows <= highest).all()

    def error(of_heads):
        """On the lower convex hull of errors at sizes within the bound."""
        whole = 0.0
        for head, window in enumerate(of_heads):
            known = [(size, errors[n, head].item()) for n, size in enumerate(sizes) if size <= highest[head]]
            lines = [
                low + (high - low) * (window - one) / (two - one)
                for one, low in known
                for two, high in known
                if one <= window <= two and one < two
            ]
            whole += min([*lines, *(low for size, low in known if size <= window)])
        return whole

    others = itertools.product(*(range(1, bound + 1) for bound in highest.tolist()))
    best = min(error(other) for other in others if sum(other) == total)
    assert error(windows.tolist()) == pytest.approx(best, abs=1e-9)


def dense_outputs(query, key, value, scaling, softcap, visible):
    """[Hq, N, Dv] float64: attention to the visible keys [Hkv, N, N]."""
    group = len(query) // len(key)
    key, value, visible = (given.repeat_interleave(group, 0) for given in (key, value, visible))
    logits = query.double() @ key.double().mT * scaling
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value.double()


def dense_errors(looks, gates, slopes, windows, sinks, recent):
    """[slopes, windows, Hkv] squared changes of outputs and the squares of the full ones, from N x N matrices."""
    length = gates.shape[-1]
    age = torch.arange(length)[:, None] - torch.arange(length)
    own = ((age >= 0) & (age < looks.window)).expand(len(gates), -1, -1)
    whole = torch.zeros(len(looks.query), length, looks.query.shape[-1]).index_copy(1, looks.at, looks.query)
    layer = (whole, looks.key, looks.value, looks.scaling, looks.softcap)
    full = dense_outputs(*layer, own)[:, looks.at]
    errors = []
    for slope in slopes:
        ranked = (gates.double() + slope * torch.arange(length))[None]
        for window in windows:
            visible = dense_visibility(ranked, window_size=window, sinks=sinks, recent=recent)[0]
            change = dense_outputs(*layer, visible)[:, looks.at] - full
            errors.append(change.square().sum((1, 2)).unflatten(0, (len(gates), -1)).sum(1))
    return torch.stack(errors).unflatten(0, (len(slopes), len(windows))), full.square().sum()


@pytest.mark.parametrize(("softcap", "own", "sinks", "recent"), [(None, 40, 2, 3), (2.0, 9, 0, 0)])
def test_errors_of_windows_are_those_of_dense_attention(softcap, own, sinks, recent):
    torch.manual_seed(0)
    at = torch.tensor([0, 5, 6, 21, 39])
    looks = Looks(
        at, torch.randn(4, 5, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 6), scaling=0.5, softcap=softcap, window=own
    )
    gates = torch.randint(0, 9, (2, 40)).float()  # with equal ones
    sizes = {"sinks": sinks, "recent": recent}
    got = window_errors(looks, gates, [0.0, 0.3, 9.0], [1, 4, 11, 60], **sizes)
    want = dense_errors(looks, gates, [0.0, 0.3, 9.0], [1, 4, 11, 60], **sizes)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_each_head_has_the_slope_that_changes_its_outputs_least():
    model, texts, slopes = causal_lm("Gemma2", sliding_window=20), batches(), [0.0, 0.1, 3.0]
    seen: dict = {layer.self_attn: [] for layer in model.model.layers}
    with (
        torch.no_grad(),
        full_attention(model, lambda call: seen[call.layer].append(call), {model.model.layers[0].self_attn: 20}),
    ):
        for ids in texts:
            model.base_model(input_ids=ids, use_cache=False)
    found = calibrate(
        model, texts, window_size=[(5, 9), 7], sinks=1, recent=2, far=FAR, slopes=slopes, reads_keys=False
    )
    at = future.measured_queries(LENGTH)
    for layer, calls in enumerate(seen.values()):
        gate = model.model.layers[layer].self_attn.value_gate
        errors, squares = torch.zeros(3, 3, 2).double(), torch.zeros(()).double()
        for call in calls:
            for query, key, value in zip(call.query, call.key, call.value, strict=True):
                looks = Looks(
                    at,
                    query[:, at],
                    key,
                    value,
                    scaling=call.scaling,
                    softcap=call.arguments["softcap"],
                    window=call.window,
                )
                with torch.no_grad():
                    gates = gate._project(gate.dt_proj, value[None])[0]
                change, square = dense_errors(looks, gates, slopes, sorted({5, 7, 9}), 1, 2)
                errors, squares = errors + change, squares + square
        of_heads = torch.stack(
            [errors[:, [5, 7, 9].index(window), head] for head, window in enumerate(found.windows[layer])]
        )
        torch.testing.assert_close(
            torch.tensor(found.errors[layer]).double(), of_heads.amin(1) / squares, atol=1e-6, rtol=1e-3
        )
        assert found.slopes[layer] == [slopes[number] / 2 for number in of_heads.argmin(1)]


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
