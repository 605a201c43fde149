"""The pictures draw their arguments, have labels, and do not use pyplot."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flexdma import Lifespans, causal_top_w, plots, sliding_window
from flexdma.plots.colours import EVICTED, KEPT, NEVER
from flexdma.reference import dense_visibility

GATE = torch.tensor([[[3.0, 1.0, 2.0, 5.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]]])
ALIVE = causal_top_w(GATE, 2)


def labelled(figure: Figure) -> bool:
    # All axes but colour bars have both labels somewhere in their row and column.
    axes = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    titled = figure.get_suptitle() or any(a.get_title() for a in axes)
    return bool(titled) and any(a.get_xlabel() for a in axes) and any(a.get_ylabel() for a in axes)


def drawn(figure: Figure) -> Figure:
    figure.canvas.draw()
    assert labelled(figure)
    return figure


def pixels(axes: Axes) -> np.ma.MaskedArray:
    """What the first image of the axes shows."""
    image = axes.images[0].get_array()
    assert isinstance(image, np.ma.MaskedArray)
    return image


def test_the_mask_is_the_dense_mask():
    figure = drawn(plots.mask_figure(ALIVE))
    dense = dense_visibility(GATE, window_size=2)[0]
    for axes, expected in zip(figure.axes, dense, strict=False):
        image = pixels(axes)
        assert torch.equal(~torch.as_tensor(image.mask | (image.data != image.data)), expected)


def test_masks_of_several_models_and_layers_stand_in_a_grid():
    figure = drawn(plots.mask_figure({"one": [ALIVE, ALIVE], "two": [ALIVE, ALIVE]}))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(titles) == 8
    assert titles[5] == "two\nlayer 0, head 1"
    with pytest.raises(ValueError, match="the same number and shape of layers"):
        plots.mask_figure({"one": [ALIVE], "two": [ALIVE, ALIVE]})


def test_blocks_are_counted_in_both_orders():
    gate = torch.randn(1, 1, 96)
    alive = causal_top_w(gate, 8)
    figure = drawn(plots.block_figure(alive, window_size=8, block_size=8))
    dense = dense_visibility(gate, window_size=8)[0, 0].view(12, 8, 12, 8).sum((1, 3))
    natural, packed = figure.axes
    assert f"{int((dense > 0).sum())} tiles visited" in natural.get_title()
    assert int((dense > 0).sum()) >= plots.visited(torch.as_tensor(pixels(packed).data))


def test_a_line_from_birth_to_death_for_each_key_that_is_ever_visible():
    figure = drawn(plots.lifespan_figure(ALIVE, gate=GATE, tokens=list("ab$_d"), query=3))
    (axes,) = (a for a in figure.axes if a.collections and a.get_title())
    lines = axes.collections[0]
    assert isinstance(lines, LineCollection)
    segments = {(int(s[0, 1]), int(s[0, 0]), int(s[1, 0])) for s in lines.get_segments()}
    birth, death = (t[0, 0].tolist() for t in ALIVE)
    assert segments == {(key, birth[key], death[key]) for key in range(5) if death[key] > birth[key]}
    assert [key for key in range(5) if death[key] == birth[key]] == np.asarray(axes.lines[0].get_xdata()).tolist()
    assert "2 keys" in str(axes.get_legend_handles_labels()[0][1].get_label())


def test_gates_are_coloured_by_what_the_query_does_with_the_key():
    figure = drawn(plots.gate_figure(GATE, ["a", "$x$", "漢", "\x00", "e"], lifespans=ALIVE, query=3))
    (axes,) = figure.axes
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == [KEPT, EVICTED, EVICTED, KEPT, "#FFFFFF"]
    assert [bar.get_height() + bar.get_y() for bar in axes.patches if isinstance(bar, Rectangle)] == pytest.approx(
        GATE[0, 0].tolist()
    )
    last = plots.gate_figure(GATE, list("abcde"), lifespans=ALIVE)
    assert to_hex(last.axes[0].patches[4].get_facecolor()).upper() == NEVER


def test_long_texts_go_on_in_further_lines_and_gates_may_be_infinite():
    gate = torch.randn(200)
    gate[3], gate[4], gate[5] = float("inf"), float("-inf"), float("nan")
    assert len(drawn(plots.gate_figure(gate, ["x"] * 200)).axes) == 3
    drawn(plots.gate_figure(torch.full((3,), 7.0), list("abc")))
    drawn(plots.lifespan_figure(causal_top_w(gate[None, None], 4), gate=gate))
    with pytest.raises(ValueError, match="gate: expected 3 keys"):
        plots.gate_figure(gate, list("abc"))


def test_the_share_of_keys_never_visible():
    assert plots.never_visible([ALIVE, sliding_window(GATE, 2)]).tolist() == [[pytest.approx(0.2), 0.0], [0.0, 0.0]]
    shares = torch.rand(3, 2, 2)
    figure = drawn(plots.sparsity_figure([1, 5, 9], {"one": shares, "two": shares}))
    assert len(figure.axes) == 2
    line = figure.axes[0].lines[1]
    assert np.asarray(line.get_xdata()).tolist() == [1, 5, 9]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx((100 * shares[:, 0, 1]).tolist())
    with pytest.raises(ValueError, match="shares: expected"):
        plots.sparsity_figure([1], shares)


def test_lifetimes_are_shares_of_the_keys():
    figure = drawn(plots.lifetime_figure(ALIVE, window_size=2))
    heights = [bar.get_height() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    assert sum(heights) == pytest.approx(2)  # one histogram for each of two heads


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_texts_can_be_drawn(length):
    gate = torch.zeros(1, 1, length)
    alive = causal_top_w(gate, 4)
    for figure in (
        plots.mask_figure(alive),
        plots.block_figure(alive, window_size=4),
        plots.lifespan_figure(alive),
        plots.lifetime_figure(alive),
        plots.gate_figure(gate, ["x"] * length),
    ):
        drawn(figure)
    never = Lifespans(*(torch.zeros(1, 1, length, dtype=torch.int32) for _ in range(2)))
    drawn(plots.lifespan_figure(never))


def test_pyplot_is_not_touched_and_matplotlib_is_asked_for_by_name():
    program = """if True:
        import importlib.util, sys
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "matplotlib" else found(name, *more)
        try:
            import flexdma.plots
        except ImportError as error:
            print(error)
        importlib.util.find_spec = found
        import flexdma.plots
        assert "matplotlib.pyplot" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pip install flexdma[plot]" in done.stdout


def test_losses_are_smoothed_and_compared_step_by_step():
    losses = {"a": [float(step) for step in range(20)], "b": [step + 0.5 for step in range(20)], "c": [9.0] * 20}
    figure = drawn(plots.loss_figure(losses, {"a": 1.0, "b": 2.0, "c": 3.0}, baseline="a"))
    left, right = figure.axes
    smooth = [np.mean(losses["a"][max(0, step - 14) : step + 1]) for step in range(20)]
    assert np.asarray(left.lines[0].get_ydata()) == pytest.approx(smooth, abs=1e-5)
    assert [np.asarray(line.get_ydata())[-1] for line in right.lines] == pytest.approx(
        [0, 0.5, 9 - smooth[-1]], abs=1e-5
    )
    assert right.get_ylim()[1] == pytest.approx(0.6)  # c is far away
    assert "b: 2.000" in str(left.get_legend_handles_labels()[1])
    two = plots.loss_figure({name: losses[name] for name in "ac"}, {"a": 1.0, "c": 3.0}, baseline="a")
    assert two.axes[1].get_ylim()[1] == pytest.approx(1.2 * 9)  # of two models both are seen
    with pytest.raises(ValueError, match="baseline: expected one of a, b, c, got d"):
        plots.loss_figure(losses, {}, baseline="d")
    with pytest.raises(ValueError, match="losses: expected the same number of steps for each label, got"):
        plots.loss_figure({"a": losses["a"], "d": [1.0]}, {}, baseline="a")
