"""The pictures of the report: masks and gates of the trained models, sparsity over training, and losses."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flexdma import Lifespans, plots
from flexdma.plots.arguments import head_name
from flexdma.plots.colours import SERIES
from flexdma.tools.byte_models.labels import byte_labels
from flexdma.tools.byte_models.model import ByteModel, layer_gates
from flexdma.tools.demo import masks
from flexdma.tools.demo.report import Outcome

MASK_STRETCH = 256  # bytes in the pictures of the masks, because details of more would be below a pixel
GATE_STRETCH = 320  # bytes in the picture of the gates, four lines of text
PICTURE_BLOCK = 32
SMOOTHING = 15  # steps


def report_figures(
    validation: Tensor,
    models: dict[str, ByteModel],
    outcomes: dict[str, Outcome],
    *,
    window: int,
    context: int,
    stretch: int,
) -> tuple[dict[str, Figure], dict[str, dict]]:
    """The pictures by name, and their counts of tiles.  validation: bytes, of which up to `stretch` are drawn."""
    long = validation[None, :stretch].to(models["dma"].embedding.weight.device)
    long = long[:, : long.shape[1] // PICTURE_BLOCK * PICTURE_BLOCK]
    short = long[:, : min(MASK_STRETCH, context)]
    dynamic = {outcomes[kind].label: models[kind] for kind in ("dma", "dma-recency")}
    alive = {label: masks.layer_lifespans(model, long) for label, model in dynamic.items()}

    scattered, counts = {}, {}
    for label, layers in alive.items():
        layer, head, maps = masks.most_scattered_head(layers, window, PICTURE_BLOCK)
        name = head_name(layer, head)
        scattered[f"{label}, {name}"] = Lifespans(*(t[0, head] for t in layers[layer]))
        counts[label] = {
            "head": name,
            "bytes": long.shape[1],
            "block": PICTURE_BLOCK,
            "natural": plots.visited(maps.natural),
            "packed": plots.visited(maps.packed),
        }
    label = outcomes["dma"].label
    layer, head, _ = masks.most_scattered_head(alive[label], window, PICTURE_BLOCK)
    where = f"{label}, {head_name(layer, head)}"
    gate, lifespans = layer_gates(models["dma"], short)[layer]
    line = long[:, : min(GATE_STRETCH, context)]
    line_gate, line_lifespans = layer_gates(models["dma"], line)[layer]
    return {
        "masks": plots.mask_figure(
            {label: masks.layer_lifespans(model, short) for label, model in dynamic.items()},
            title=f"Learned masks on validation text: each query (row) sees the {window} keys coloured in its row",
        ),
        "blocks": plots.block_figure(scattered, window_size=window, block_size=PICTURE_BLOCK),
        "lifespans": plots.lifespan_figure(
            lifespans,
            gate=gate,
            query=short.shape[1] * 3 // 4,
            head=head,
            title=f"{where}: each key is visible from its birth until {window} better ones have evicted it",
        ),
        "lifetimes": plots.lifetime_figure(
            alive,
            window_size=window,
            title=f"How long keys stay visible, over {long.shape[1]:,} bytes of validation text",
        ),
        "gates": plots.gate_figure(
            line_gate,
            byte_labels(bytes(line[0].tolist())),
            lifespans=line_lifespans,
            head=head,
            title=f"{where}: the gate of every byte, and the {window} bytes that the last query sees",
        ),
        "sparsity": plots.sparsity_figure(
            outcomes["dma"].course.recorded_steps,
            {
                outcomes[kind].label: torch.tensor(outcomes[kind].course.never_visible)
                for kind in ("dma", "dma-recency")
            },
            title="Keys that the gates reject on arrival, over training (0 %: a sliding window)",
        ),
        "losses": loss_figure(
            {outcome.label: outcome.course.losses for outcome in outcomes.values()},
            {outcome.label: outcome.bits_per_byte for outcome in outcomes.values()},
            baseline=outcomes["full"].label,
        ),
    }, counts


def loss_figure(losses: dict[str, Sequence[float]], validation: dict[str, float], baseline: str) -> Figure:
    """The training losses (left), and their difference to the loss of `baseline` on the same batches (right)."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    smooth = {label: _smoothed(torch.tensor(values)) for label, values in losses.items()}
    steps = range(1, len(smooth[baseline]) + 1)
    gaps = {label: values - smooth[baseline] for label, values in smooth.items()}
    # Wide lines below narrow ones, so that all curves stay visible where they coincide.
    for colour, width, label in zip(SERIES[:4], (2.0, 5.0, 2.5, 1.2), smooth, strict=True):
        style = {"color": colour, "linewidth": width}
        left.plot(steps, smooth[label].tolist(), label=f"{label}: {validation[label]:.3f}", **style)
        right.plot(steps, gaps[label].tolist(), **style)
    left.set_ylabel(f"training loss, bits per byte (mean of {SMOOTHING} steps)")
    left.set_title("Training loss")
    left.legend(title="validation, bits per byte")
    # The scale ignores the most distant model, which the left panel shows.
    near = sorted(gaps.values(), key=lambda gap: gap.abs().max().item())[:-1]
    reach = 1.2 * max(0.01, *(gap.abs().max().item() for gap in near))
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
    end = torch.arange(1, len(values) + 1)
    start = (end - SMOOTHING).clamp(min=0)
    return (total[end] - total[start]) / (end - start)
