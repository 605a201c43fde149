"""Needles, texts and probes of the experiments, against what the sequences and the masks themselves say."""

import re
from dataclasses import replace

import pytest
import torch

from flexdma import DynamicMaskAttention, DynamicMaskLatentAttention
from flexdma.tools.byte_models.text import TextError
from flexdma.tools.experiments.gate_variants import CANDIDATES, GATE_VARIANTS
from flexdma.tools.experiments.mixers import ModelSizes
from flexdma.tools.experiments.model import SequenceModel
from flexdma.tools.experiments.probes import GateCourse, HeatMap
from flexdma.tools.experiments.probes.by_token import parallel_and_by_token
from flexdma.tools.experiments.probes.gate_course import content_gate
from flexdma.tools.experiments.probes.heat_map import kept_bytes
from flexdma.tools.experiments.tasks import IGNORED, Language, Needles, Recall

SIZES = ModelSizes(width=16, heads=2, kv_heads=2, window=6)
RECALL = Recall(length=24, pairs=3, questions=4, keys=5, values=5, noise=5)


@pytest.mark.parametrize(
    "task",
    [
        Needles(length=64, needles=5, digits=2),
        Needles(length=31, needles=5),
        Needles(length=31, needles=4, at_end=True),
    ],
)
def test_each_question_about_a_needle_has_one_answer_before_it(task):
    batch = task.batch(20, torch.Generator().manual_seed(0))
    for symbols, targets, distance in zip(*batch, strict=True):
        text = bytes(symbols[:, 0].tolist())
        hidden = {found[1]: found for found in re.finditer(rb"#([A-Z])(\d+)", text)}
        questions = list(re.finditer(rb"\?([A-Z])(\d+)", text))
        assert len(hidden) == len(questions) == task.needles
        expected = {}
        for question in questions:
            answer = hidden[question[1]]
            assert question[2] == answer[2]
            assert answer.end() <= question.start()
            assert not task.at_end or question.start() >= task.haystack
            for digit in range(task.digits):
                at = question.start(2) + digit - 1
                expected[at] = (answer[2][digit], at - answer.start(2) - digit)
        asked = (targets != IGNORED).nonzero().flatten().tolist()
        assert {at: (targets[at].item(), distance[at].item()) for at in asked} == expected


def test_texts_ask_for_the_next_byte_and_hold_out_their_end(tmp_path):
    path = tmp_path / "text"
    content = bytes(range(200)) * 10 + b"\xff" * 300
    path.write_bytes(content)
    task = Language(length=20, text=str(path)).with_digest()
    training = task.batch(64, torch.Generator().manual_seed(0))
    held_out = task.held_out(4)
    for batch in (training, held_out):
        for symbols, targets in zip(batch.symbols[..., 0], batch.targets, strict=True):
            window = bytes([*symbols.tolist(), targets[-1].item()])
            assert window in content
            assert symbols[1:].tolist() == targets[:-1].tolist()
    split = len(content) - len(content) // 10
    assert bytes(held_out.targets[0].tolist()) in content[split:]
    assert (held_out.symbols == 0xFF).all()
    assert (training.symbols != 0xFF).any(1).all()
    path.write_bytes(content[1:])
    with pytest.raises(TextError, match="digest"):
        replace(task, length=21).held_out(1)


def test_mixers_have_equal_parameters():
    sizes = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, window=8)
    counts = [
        sum(p.numel() for p in SequenceModel(name, sizes, 50).parameters())
        for name in CANDIDATES
        if CANDIDATES[name].is_installed
    ]
    assert max(counts) - min(counts) <= 2 * sizes.layers * sizes.width


def test_logits_at_some_positions_are_those_of_all():
    model = SequenceModel("DMA", SIZES, RECALL.symbols)
    batch = RECALL.held_out(3)
    at = batch.targets != IGNORED
    torch.testing.assert_close(model(batch.symbols, at), model(batch.symbols)[at])


def _gate(name):
    layer = CANDIDATES[name].make(SIZES)
    assert isinstance(layer, DynamicMaskAttention)
    return layer.gate


def _with_gates(name, seed=0):
    """A model whose gates differ between keys, and whose answers depend on its attention, as after training."""
    model = SequenceModel(name, SIZES, RECALL.symbols, seed=seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gate.A"):
            torch.nn.init.constant_(parameter, 1.0)
        if parameter_name.endswith("o_proj.weight"):
            torch.nn.init.normal_(parameter, std=5.0)
    return model


@pytest.mark.parametrize("name", ["linear from 1", "identity from 1", "exp + slope", "linear from 1 + forget"])
def test_the_course_of_gates_counts_what_the_masks_have(name):
    model = _with_gates(name)
    found = GateCourse(sequences=3, by_token=1).measure(model, RECALL, is_last=False)
    (layer,) = (module for module in model.modules() if isinstance(module, DynamicMaskAttention))
    taken = []
    layer.gate.register_forward_hook(lambda module, inputs, output: taken.append((inputs[0], output)))
    symbols = RECALL.held_out(3).symbols
    model(symbols)
    ((value, gates),) = taken
    is_pair, is_noise = RECALL.pairs_and_noise(symbols)
    for head in range(SIZES.kv_heads):
        seen = beyond = 0
        lives: dict[bool, list[int]] = {True: [], False: []}
        of_pairs: list[float] = []
        of_noise: list[float] = []
        for row in range(3):
            gate = gates[row, head].tolist()
            visible = [
                sorted(range(query + 1), key=lambda key: (gate[key], key))[-SIZES.window :]
                for query in range(RECALL.length)
            ]
            seen += sum(map(len, visible))
            beyond += sum(query - key >= SIZES.window for query, keys in enumerate(visible) for key in keys)
            content = content_gate(layer.gate, value)[row, head].tolist()
            for key in range(RECALL.length):
                if is_pair[row, key] or is_noise[row, key]:
                    lives[bool(is_pair[row, key])].append(sum(key in keys for keys in visible))
                    (of_pairs if is_pair[row, key] else of_noise).append(content[key])
        above = sum((a > b) + (a == b) / 2 for a in of_pairs for b in of_noise) / (len(of_pairs) * len(of_noise))
        assert found["beyond"][0][head] == pytest.approx(beyond / seen)
        assert found["pairs_live"][0][head] == pytest.approx(sum(lives[True]) / len(lives[True]))
        assert found["noise_live"][0][head] == pytest.approx(sum(lives[False]) / len(lives[False]))
        assert found["ranked"][0][head] == pytest.approx(above)
        gap = sum(of_pairs) / len(of_pairs) - sum(of_noise) / len(of_noise)
        assert found["gap"][0][head] == pytest.approx(gap, abs=1e-5)
    assert ("slope" in found) == name.endswith("slope")


def test_pairs_are_the_positions_that_answer():
    batch = RECALL.held_out(5)
    is_pair, is_noise = RECALL.pairs_and_noise(batch.symbols)
    asked = batch.targets != IGNORED
    position = torch.arange(RECALL.length) - batch.distance
    assert is_pair.gather(-1, position)[asked].all()
    assert (is_pair.long() + is_noise.long() + asked.long() == 1).all()


def test_a_content_gate_is_the_gate_without_its_recency():
    value = torch.randn(2, 2, 9, 8)
    for recency in ("slope", "forget"):
        gate = _gate(f"linear from 1 + {recency}")
        plain = content_gate(gate, value)
        if recency == "slope":
            added = gate.slope.double()[:, None] * torch.arange(9)
        else:
            joined = value.transpose(1, 2).flatten(2)
            added = -torch.nn.functional.logsigmoid(gate.forget_proj(joined)).mT.double().cumsum(-1)
        torch.testing.assert_close(plain + added, gate(value))


def test_only_a_global_choice_differs_token_by_token():
    batch = RECALL.held_out(16)
    same = {
        name: parallel_and_by_token(_with_gates(name), batch)["same"]
        for name in ("linear from 1", "linear from 1 + slope", "identity from 1 global")
    }
    assert same["linear from 1"] == same["linear from 1 + slope"] == 1
    assert same["identity from 1 global"] < 1


def test_answers_in_one_pass_and_by_token_are_those_of_the_batch():
    model = _with_gates("full")
    batch = RECALL.held_out(200)
    found = parallel_and_by_token(model, batch)
    asked = batch.targets != IGNORED
    with torch.no_grad():
        answers = model(batch.symbols).argmax(-1)
    expected = (answers[asked] == batch.targets[asked]).double().mean().item()
    assert found == {"parallel": expected, "by_token": expected, "same": 1.0}
    assert expected > 0


def test_memory_of_latents_is_that_of_their_state():
    layer = DynamicMaskLatentAttention(16, 2, 4, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    model = torch.nn.Sequential(layer)
    state = layer(torch.randn(1, 9, 16), return_state=True)[1]
    assert kept_bytes(model, 9) == state.key.nbytes + state.value.nbytes
    assert kept_bytes(torch.nn.Linear(2, 2), 9) is None


@pytest.mark.parametrize("name", ["full", "SQA", "window", "sinks + window", "DMA + slope"])
def test_memory_is_that_of_the_state(name):
    model = SequenceModel(name, SIZES, 256)
    (layer,) = (module for module in model.modules() if isinstance(module, DynamicMaskAttention))
    for length in (4, 30):
        if layer.policy.capacity is not None:
            state = layer(torch.randn(1, length, 16), return_state=True)[1]
            expected = (state.position >= 0).sum().item() * 2 * layer.head_dim * 4
        else:
            expected = sum(t.nbytes for t in layer.project(torch.randn(1, length, 16))[1:])
        assert kept_bytes(model, length) == expected


def test_a_heat_map_puts_each_question_at_the_depth_of_its_needle():
    task = Needles(length=48, needles=4)
    probe = HeatMap(lengths=(48, 96), depths=4, tokens=192)
    model = SequenceModel("full", SIZES, 256, convolution=3, rotary=False)
    assert probe.measure(model, task, is_last=False) == {}
    found = probe.measure(model, task, is_last=True)
    assert found["questions"] == [16, 8]
    with torch.no_grad():
        for row, (length, sequences) in enumerate([(48, 4), (96, 2)]):
            batch = replace(task, length=length, at_end=True).held_out(sequences)
            answers = model(batch.symbols).argmax(-1)
            right: list[list[bool]] = [[], [], [], []]
            for sequence, symbols in enumerate(batch.symbols[..., 0].tolist()):
                text = bytes(symbols)
                for asked in re.finditer(rb"\?([A-Z])(\d)", text):
                    needle = re.search(b"#" + asked[1], text)
                    assert needle is not None
                    depth = (needle.start() + 2) * 4 // (length - 12)
                    right[depth].append(answers[sequence, asked.start() + 1].item() == asked[2][0])
            assert found["accuracy"][row] == [sum(cell) / len(cell) if cell else None for cell in right]
            assert found["overall"][row] == sum(map(sum, right)) / (4 * sequences)


def test_variants_of_the_gate_start_as_their_names_say():
    for name in GATE_VARIANTS:
        gate = _gate(name)
        assert gate.form == name.split()[0]
        assert ((1.0 if "from 1" in name else 0.0) == gate.A).all()
        assert gate.recency == (name.split("+ ")[1] if "+" in name else None)


@pytest.mark.parametrize("mixer", ["full", "NSA", "DMA + forget"])
def test_the_seed_alone_decides_all_weights(mixer):
    models = []
    for other in (1, 2):
        torch.manual_seed(other)
        models.append(SequenceModel(mixer, SIZES, 40, convolution=3, seed=5))
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
