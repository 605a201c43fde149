"""Losses over training, and how they differ from those of one model."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flexdma.plots.colours import series_style

SMOOTHING = 15  # steps
WIDTHS = (2.0, 5.0, 2.5, 1.2)


def loss_figure(losses: Mapping[str, Sequence[float]], validation: Mapping[str, float], baseline: str) -> Figure:
    """The training losses (left), and their difference to the loss of `baseline` on the same batches (right).

    losses: bits per byte at each step, by label, the same number of steps for each.  validation: bits per byte, by label.
    Raises ValueError where `baseline` is none of the labels or the numbers of steps differ.
    """
    lengths = {label: len(values) for label, values in losses.items()}
    if baseline not in lengths:
        raise ValueError(f"baseline: expected one of {', '.join(lengths)}, got {baseline}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"losses: expected the same number of steps for each label, got {lengths}")
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    smooth = {label: _smoothed(torch.tensor(values, device="cpu")) for label, values in losses.items()}
    steps = range(1, lengths[baseline] + 1)
    gaps = {label: values - smooth[baseline] for label, values in smooth.items()}
    for index, label in enumerate(smooth):
        # Wide lines below narrow ones, so that all curves stay visible where they coincide.
        style = {"color": series_style(index)["color"], "linewidth": WIDTHS[index % len(WIDTHS)]}
        left.plot(steps, smooth[label].tolist(), label=f"{label}: {validation[label]:.3f}", **style)
        right.plot(steps, gaps[label].tolist(), **style)
    left.set_ylabel(f"training loss, bits per byte (mean of {SMOOTHING} steps)")
    left.set_title("Training loss")
    left.legend(title="validation, bits per byte")
    # The scale ignores the most distant of three or more models, which the left panel shows.
    near = sorted(gap.abs().max().item() for gap in gaps.values())
    reach = 1.2 * max(0.01, *(near[:-1] if len(near) > 2 else near))
    right.set_ylim(-reach, reach)
    right.set_ylabel(f"bits per byte more than {baseline}")
    right.set_title(f"Training loss minus that of {baseline} on the same batches")
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.25)
    return figure


def _smoothed(values: Tensor) -> Tensor:
    """The mean of each value and up to SMOOTHING - 1 values before it."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    end = torch.arange(1, len(values) + 1, device="cpu")
    start = (end - SMOOTHING).clamp(min=0)
    return (total[end] - total[start]) / (end - start)
