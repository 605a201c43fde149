"""Bits per byte over parameters, as a picture: a panel per text, a line per mixer."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from flexdma.plots.colours import series_style
from flexdma.tools.experiments.experiment import Experiment


def scaling(experiments: Sequence[Experiment]) -> Figure:
    """experiments: lm-TEXT-WIDTH of one preset.  Bars are from the best seed to the worst."""
    texts = list(dict.fromkeys(experiment.setting["task"]["text"] for experiment in experiments))
    result = Figure(figsize=(4.6 * len(texts) + 1.8, 4.4), layout="constrained")
    panels = result.subplots(1, len(texts), squeeze=False)[0]
    styles: dict[str, Any] = {}
    for panel, text in zip(panels, texts, strict=True):
        points: dict[str, list[tuple[int, list[float]]]] = {}
        for experiment in experiments:
            for row in experiment.rows() if experiment.setting["task"]["text"] == text else ():
                points.setdefault(row.mixer, []).append((row.outcomes[0].parameters, row.bits))
        for mixer, found in points.items():
            style = styles.setdefault(mixer, series_style(len(styles)))
            parameters, bits = zip(*sorted(found), strict=True)
            means = [fmean(seeds) for seeds in bits]
            below = [mean - min(seeds) for mean, seeds in zip(means, bits, strict=True)]
            above = [max(seeds) - mean for mean, seeds in zip(means, bits, strict=True)]
            panel.errorbar(parameters, means, [below, above], label=mixer, marker=".", capsize=2, **style)
        sizes = sorted({parameters for found in points.values() for parameters, _ in found})
        panel.set_xscale("log")
        # One tick per size of model; mixers of one size differ by few parameters.
        shown = [size for before, size in zip([0, *sizes], sizes, strict=False) if size > 1.1 * before]
        panel.set_xticks(shown, [f"{size:,}" for size in shown])
        panel.minorticks_off()
        panel.set_xlabel("parameters")
        panel.set_title(text)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("bits per byte of held-out text")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return result
