"""DynamicMaskState as a value: its contents, moving, cropping, saving, and refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from flexdma import (
    DynamicMaskAttention,
    DynamicMaskState,
    causal_top_w,
    dynamic_mask_attention,
    load_states,
    pack,
    packed_layout,
    save_states,
)
from flexdma.state import files
from tests.comparison import inputs


def after(tokens, *, window_size=3, batch=2, state=None, start=0, seed=0, **options):
    """The state after the tokens start .. start + tokens - 1 of a fixed random sequence, and their output."""
    tensors = [t[:, :, start : start + tokens] for t in inputs(batch, 4, 2, 64, 64, 4, dtype=torch.float32, seed=seed)]
    output, state = dynamic_mask_attention(*tensors, window_size=window_size, state=state, return_state=True, **options)
    return state, output


def assert_equal_states(a, b):
    assert a.options() == b.options()
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=0, atol=0, msg=name)


def test_literal():
    gate = torch.tensor([[[3.0, 1.0, 2.0, 5.0, 0.0]]])
    key = torch.arange(5.0).view(1, 1, 5, 1)
    _, state = dynamic_mask_attention(key, key, key, gate, window_size=2, sinks=1, recent=1, return_state=True)
    assert isinstance(state, DynamicMaskState)
    # The sink is 0, and 4 is recent.  Of the others, 1 to 3, the top-2 are 2 and 3.
    assert state.position.tolist() == [[[0, 2, 3, 4]]]
    assert state.key.flatten().tolist() == [0.0, 2.0, 3.0, 4.0]
    assert state.gate.tolist() == [[[3.0, 2.0, 5.0, 0.0]]]
    assert (state.length.tolist(), state.last_sink.tolist(), state.widest) == ([5], [[0]], 2)
    # At 4 key 3 is no longer recent and takes the place of key 1.
    assert state.last_loss.tolist() == [[4]]


def test_memory_does_not_grow():
    short, _ = after(4)
    long, _ = after(40)
    assert short.nbytes == long.nbytes == DynamicMaskState.empty(2, 2, 4, 3).nbytes


def test_is_a_pytree():
    state, _ = after(5)
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 11
    assert_equal_states(pytree.tree_unflatten(leaves, spec), state)
    assert pytree.tree_map(lambda leaf: leaf.to("meta"), state).key.device.type == "meta"
    paths, _spec = pytree.tree_flatten_with_path(state)
    assert [str(path[0]) for path, _leaf in paths][:2] == [".key", ".value"]
    heads, _ = after(5, window_size=[2, 3])
    leaves, spec = pytree.tree_flatten(heads)
    assert_equal_states(pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))), heads)


def test_values_only():
    """No call changes its state argument."""
    state, _ = after(9, sinks=1, recent=2)
    kept = state.checkpoint()
    for tokens in (1, 1, 4):
        after(tokens, state=state, start=9, sinks=1, recent=2)
    assert_equal_states(state, kept)


def test_checkpoint_and_restore():
    state, _ = after(20)
    saved = state.checkpoint()
    advanced, draft = after(3, state=state, start=20)
    restored = advanced.restore(saved)
    assert_equal_states(restored, state)
    again, output = after(3, state=restored, start=20)
    assert_equal_states(again, advanced)
    torch.testing.assert_close(output, draft, rtol=0, atol=0)
    with pytest.raises(ValueError, match="saved: expected window_size=3, got a state with window_size=4"):
        state.restore(after(3, window_size=4)[0])


@pytest.mark.parametrize(
    ("options", "capacity", "kept"),
    [({}, 10, 7), ({"sinks": 2, "recent": 3}, 15, 4), ({"sinks": 2, "recent": 3}, 15, 1)],
)
def test_crop_is_exact_while_nothing_was_lost(options, capacity, kept):
    """No key is evicted before there are more than w + sinks + recent."""
    window = 10
    state, _ = after(capacity, window_size=window, **options)
    cropped, expected = state.crop(capacity - kept), after(kept, window_size=window, **options)[0]
    with pytest.raises(ValueError, match=f"the last was at position {capacity}, and evicted keys are gone"):
        after(capacity + 1, window_size=window, **options)[0].crop(1)
    for a, b in ((cropped, expected), *_continued(cropped, expected, kept, window, options)):
        assert [sorted(row) for row in a.position.flatten(0, 1).tolist()] == [
            sorted(row) for row in b.position.flatten(0, 1).tolist()
        ]
        torch.testing.assert_close(a.length, b.length)
        torch.testing.assert_close(a.last_sink, b.last_sink)


def _continued(cropped, expected, start, window, options):
    pairs = []
    for tokens in (1, 20):
        (cropped, a), (expected, b) = (
            after(tokens, state=state, start=start, window_size=window, **options) for state in (cropped, expected)
        )
        torch.testing.assert_close(a, b)
        pairs.append((cropped, expected))
        start += tokens
    return pairs


def test_crop_refuses_what_is_gone():
    state, _ = after(30)
    at = int(state.last_loss.max())
    with pytest.raises(
        ValueError, match=f"the last was at position {at}, and evicted keys are gone.*got 5.*checkpoint"
    ):
        state.crop(5)
    torch.testing.assert_close(state.crop(0).position.sort().values, state.position.sort().values)
    with pytest.raises(ValueError, match=r"tokens: expected at most the \[30, 30\] tokens of each sequence, got 31"):
        state.crop(31)
    begun = state.crop(30)
    assert (begun.position == -1).all()
    assert (begun.length == 0).all()
    assert_equal_states(after(5, state=begun)[0], after(5)[0])
    forgetting = replace(after(2)[0], forgotten=torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="tokens: expected 0 with forget gates"):
        forgetting.crop(1)


def test_reorder_and_put():
    state, _ = after(12, batch=3)
    beams = state.reorder(torch.tensor([2, 2, 0, 1]))
    for row, source in enumerate((2, 2, 0, 1)):
        assert_equal_states(beams.reorder(torch.tensor([row])), state.reorder(torch.tensor([source])))
    fresh, _ = after(5, batch=1, seed=7)
    joined = state.put(torch.tensor([1]), fresh)
    assert_equal_states(joined.reorder(torch.tensor([1])), fresh)
    assert_equal_states(joined.reorder(torch.tensor([0, 2])), state.reorder(torch.tensor([0, 2])))
    with pytest.raises(ValueError, match=r"rows: expected \[1\], got \[2\]"):
        state.put(torch.tensor([0, 1]), fresh)


def test_moving():
    state, _ = after(5)
    assert state.to("meta").key.device.type == "meta"
    assert_equal_states(state.to("cpu"), state)
    with pytest.raises(TypeError, match=r"device: expected a device, got torch\.bfloat16"):
        state.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"rows: expected torch\.int64, got torch\.float32"):
        state.reorder(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_round_trip(tmp_path, dtype):
    state, _ = after(12, sinks=1)
    state = replace(state, key=state.key.to(dtype), value=state.value.to(dtype))
    heads, _ = after(4, window_size=[3, 5])
    save_states(tmp_path / "state.safetensors", {"layer.0": state, "layer.1": heads})
    loaded = load_states(tmp_path / "state.safetensors")
    assert list(loaded) == ["layer.0", "layer.1"]
    assert_equal_states(loaded["layer.0"], state)
    assert_equal_states(loaded["layer.1"], heads)


def test_torch_save_round_trip(tmp_path):
    """By `torch.load` with its default weights_only=True; lifespans and packings too."""
    state, _ = after(12, sinks=1, window_size=[3, 5])
    lifespans = causal_top_w(state.gate, 3)
    packing = pack(lifespans, packed_layout(9, 9, 3), queries=9)
    torch.save({"step": 3, "states": [state], "masks": (lifespans, packing)}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt")
    assert isinstance(loaded["states"][0], DynamicMaskState)
    assert_equal_states(loaded["states"][0], state)
    output = after(1, state=loaded["states"][0], start=12, sinks=1, window_size=[3, 5])[1]
    assert torch.equal(output, after(1, state=state, start=12, sinks=1, window_size=[3, 5])[1])
    for ours, theirs in zip(loaded["masks"], (lifespans, packing), strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(tuple(ours), tuple(theirs))


def test_files_hold_states_that_share_tensors(tmp_path):
    before, _ = after(9)
    later, _ = after(1, state=before, start=9)
    save_states(tmp_path / "both", {"before": before, "after": later})
    assert_equal_states(load_states(tmp_path / "both")["after"], later)


def test_what_no_file_can_hold(tmp_path):
    state, _ = after(3)
    for states, message in (({0: state}, "states: expected names to states, got 0 to DynamicMaskState"),
                            ({"a": 1}, "states: expected names to states, got 'a' to int"),
                            ([state], "states: expected a mapping of names to states, got list")):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            save_states(tmp_path / "state", states)  # type: ignore[arg-type]  # refused
    for path in (tmp_path, tmp_path / "absent" / "state"):
        with pytest.raises(ValueError, match="path: expected a file in a folder that exists"):
            save_states(path, {"a": state})
    with pytest.raises(ValueError, match="path: expected a file, got the folder"):
        load_states(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"position": torch.full((2, 2, 3), 99)},
        {"length": torch.tensor([-1, 3])},
        {"length": torch.tensor(3)},
        {"key": torch.zeros(2, 2, 3, 4, dtype=torch.int32)},
        {"last_sink": torch.zeros(2, 3, dtype=torch.int64)},
    ],
)
def test_a_file_that_is_whole_but_no_state_is_refused(tmp_path, change):
    state, _ = after(3)
    save_states(tmp_path / "state", {"a": replace(state, **change)})
    with pytest.raises(ValueError, match="path: expected states that their options describe"):
        load_states(tmp_path / "state")


@pytest.mark.parametrize(
    ("options", "lacks_keys"),
    [
        ({}, False),
        ({"sinks": 1}, True),
        ({"recent": 2, "window_size": [3, 5]}, True),
        ({"sinks": 2, "selection": "sliding"}, False),
        ({"recent": 2, "selection": "sliding"}, True),
        ({"sinks": 1, "recent": 2, "selection": "threshold", "window_size": None}, False),
    ],
)
def test_files_in_which_sinks_and_recent_keys_took_places_of_the_top_w(tmp_path, monkeypatch, options, lacks_keys):
    state, _ = after(20, **options)
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", files.FORMER)
        save_states(tmp_path / "former", {"layer": state})
    if not lacks_keys:
        assert_equal_states(load_states(tmp_path / "former")["layer"], state)
        return
    with pytest.raises(
        ValueError, match=r"path: expected states without sinks and recent keys in the format .*/2.*'layer'"
    ):
        load_states(tmp_path / "former")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_states(path, {"layer": after(12)[0]})
    content = path.read_bytes()
    for keep in (0, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"path: expected a whole safetensors file, got .*state\.safetensors"):
            load_states(path)
    for at in (len(content) - 1, len(content) // 2, content.index(b"window_size")):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ValueError, match="path: expected"):
            load_states(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"path: expected the format flexdma.DynamicMaskState/3, got None"):
        load_states(path)
    with pytest.raises(FileNotFoundError):
        load_states(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 1, 1, 2]])
def test_ids_of_documents_may_be_overwritten_after_a_call(sizes):
    query, key, value, gate = inputs(1, 2, 1, 6, 6, 4)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    outputs, state, buffers = [], None, {n: torch.zeros(1, n, dtype=torch.int64) for n in sizes}
    chunks = (t.split(sizes, 2) for t in (query, key, value, gate))
    for *tensors, ids in zip(*chunks, documents.split(sizes, 1), strict=True):
        options: dict[str, Any] = {
            "document_ids": buffers[ids.shape[1]].copy_(ids),
            "state": state,
            "return_state": True,
        }
        output, state = dynamic_mask_attention(*tensors, window_size=3, **options)
        buffers[ids.shape[1]].fill_(7)
        outputs.append(output)
    want = dynamic_mask_attention(query, key, value, gate, window_size=3, document_ids=documents, lowering="dense")
    torch.testing.assert_close(torch.cat(outputs, 2), want)


def test_a_state_holds_no_memory_of_its_chunk():
    layer = DynamicMaskAttention(8, 2, 1, 4, 3, recency="forget", sinks=1, recent=1)
    state = None
    for length in (100, 7, 1, 50):
        documents = torch.zeros(2, length, dtype=torch.int64)
        _, state = layer(torch.randn(2, length, 8), state=state, return_state=True, document_ids=documents)
        for name, tensor in state.tensors().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_foreign_states_are_refused():
    state, _ = after(4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"window_size": 4}, ValueError, "state: expected window_size=4, got a state with window_size=3"),
        ({"sinks": 1}, ValueError, "state: expected sinks=1, got a state with sinks=0"),
        ({"recent": 2}, ValueError, "state: expected recent=2, got a state with recent=0"),
        ({"selection": "threshold"}, ValueError, "state: expected selection='threshold', got .*selection='causal'"),
        ({"batch": 3}, ValueError, "state: expected batch size 3, got 2"),
        (
            {"selection": "global"},
            ValueError,
            r"selection: expected one of \('causal', 'threshold', 'sliding', 'full'\) with a state",
        ),
        (
            {"window_size": None, "selection": "threshold"},
            TypeError,
            "state: expected a GrowingState, as the selection has",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            after(1, state=state, **options)
    for change, error, message in [
        ({"key": state.key.bfloat16()}, TypeError, "state: expected key of torch.float32, got torch.bfloat16"),
        ({"gate": state.gate.double()}, TypeError, "state: expected gate of torch.float32, got torch.float64"),
        ({"value": state.value[..., :2]}, ValueError, r"state: expected value \['B', 2, 3, 4\], got \[2, 2, 3, 2\]"),
        ({"key": state.key.to("meta")}, ValueError, "state: expected a state on cpu, got one on meta"),
    ]:
        with pytest.raises(error, match=message):
            after(1, state=replace(state, **change))
    with pytest.raises(TypeError, match="state: expected a DynamicMaskState, got dict"):
        after(1, state={})
    with pytest.raises(TypeError, match=r"gate_dtype: expected torch.float32 or torch.float64, got torch.bfloat16"):
        DynamicMaskState.empty(1, 1, 4, 2, gate_dtype=torch.bfloat16)


def test_a_layer_names_the_state_that_it_refuses():
    layer, hidden = DynamicMaskAttention(8, 2, 1, 4, 3, recency="slope"), torch.randn(3, 1, 8)
    for state, error, message in (
        (layer.empty_state(2), ValueError, "state: expected batch size 3, got 2"),
        (layer.empty_state(3).to("meta"), ValueError, "state: expected a state on cpu, got one on meta"),
        (layer.empty_state(3, dtype=torch.bfloat16), TypeError, r"state: expected key of torch\.float32"),
        ({}, TypeError, "state: expected a DynamicMaskState, got dict"),
    ):
        with pytest.raises(error, match=message):
            layer(hidden, state=state)
