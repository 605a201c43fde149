"""The pictures of the report: masks and gates of the trained models, sparsity over training, and losses."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flexdma import Lifespans, plots
from flexdma.plots.arguments import head_name
from flexdma.tools.byte_models.labels import byte_labels
from flexdma.tools.byte_models.model import ByteModel, layer_gates
from flexdma.tools.demo import masks
from flexdma.tools.demo.report import Outcome

MASK_STRETCH = 256  # bytes in the pictures of the masks, because details of more would be below a pixel
GATE_STRETCH = 320  # bytes in the picture of the gates, four lines of text
PICTURE_BLOCK = 32


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
        "losses": plots.loss_figure(
            {outcome.label: outcome.course.losses for outcome in outcomes.values()},
            {outcome.label: outcome.bits_per_byte for outcome in outcomes.values()},
            baseline=outcomes["full"].label,
        ),
    }, counts
