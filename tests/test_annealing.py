"""Windows that shrink in training: their sizes, and layers whose window is set between calls."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from flexdma import DynamicMaskAttention, DynamicMaskLatentAttention, annealed_window


def test_it_falls_from_the_length_to_the_window_in_eight_sizes():
    sizes = [annealed_window(64, 512, step / 1000, share=0.5) for step in range(1000)]
    assert sizes[0] == 512
    assert sizes[500:] == [64] * 500
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 8


def test_a_window_of_the_length_or_no_share_changes_nothing():
    assert [annealed_window(64, length, 0.1) for length in (1, 64)] == [64, 64]
    assert annealed_window(64, 512, 0.0, share=0) == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_size": 0}, "window_size: expected at least 1, got 0"),
        ({"length": 1.5}, "length: expected an int"),
        ({"progress": 1.1}, "progress: expected a share of the steps from 0 to 1, got 1.1"),
        ({"share": True}, "share: expected a Python number, a share of the steps, got True"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        annealed_window(**{"window_size": 64, "length": 512, "progress": 0.5} | wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: DynamicMaskAttention(32, 4, 2, 8, w, sinks=1, recency="slope"),
        lambda w: DynamicMaskAttention(32, 4, 2, 8, w, selection="sliding"),
        lambda w: DynamicMaskLatentAttention(
            32, 2, w, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
    ],
    ids=["gates", "sliding", "latent"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_has_the_window_that_is_set(make, compiled):
    layer, hidden = make(20), torch.randn(2, 40, 32)
    call = torch.compile(layer, backend="eager") if compiled else layer
    for window in (20, 7, 40):
        layer.window_size = window
        assert layer.window_size == window
        assert f"window_size={window}" in repr(layer)
        same = make(window)
        same.load_state_dict(layer.state_dict())
        torch.testing.assert_close(call(hidden), same(hidden))


def test_with_unspecialised_integers_one_compilation_serves_all_windows():
    """As the docstring of `annealed_window` says; the second one has symbolic sizes."""
    layer, hidden = DynamicMaskAttention(32, 4, 2, 8, 8, recency="slope"), torch.randn(2, 64, 32)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for window in sorted({annealed_window(8, 64, step / 24) for step in range(24)}, reverse=True):
            layer.window_size = window
            torch.testing.assert_close(compiled(hidden), layer(hidden))
    assert counter.frame_count == 2


def test_windows_per_head_and_what_is_no_window():
    layer = DynamicMaskAttention(32, 4, 2, 8, (4, 9))
    assert layer.window_size == (4, 9)
    layer.window_size = [6, 7]
    assert layer.window_size == (6, 7)
    for wrong in (0, [4, 5, 6], None):
        with pytest.raises((TypeError, ValueError), match="window_size"):
            layer.window_size = wrong
    assert layer.window_size == (6, 7)


def test_a_state_of_another_window_is_refused():
    layer = DynamicMaskAttention(32, 4, 2, 8, 9)
    _, state = layer(torch.randn(1, 5, 32), return_state=True)
    layer.window_size = 4
    with pytest.raises(ValueError, match="window_size"):
        layer(torch.randn(1, 1, 32), state=state)
