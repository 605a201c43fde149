"""The claims of the paper (arXiv 2508.02124v1, abstract), each beside the runs that test it at a small size."""

from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

from flexdma.tools.experiments.experiment import Experiment, Row

UNMEASURED = "not measured"
# The paper's; with a recency that ranks keys, and with one that is added to logits alone.
OWN = ("DMA", "DMA + slope", "DMA + forget", "DMA recent + slope", "DMA recent + forget")
RECALL = ("stacked", "unstacked", "overwritten", "copying")


class Rival(NamedTuple):
    """An attention that the paper compares with: its name there, and the mixer."""

    name: str
    mixer: str


RIVALS = (
    Rival("multi-head attention", "full"), Rival("sliding window attention", "window"),
    Rival("multi-head latent attention", "MLA"), Rival("native sparse attention", "NSA"),
)  # fmt: skip


class Claim(NamedTuple):
    """What the paper says, and the kinds of experiments that test it; none where nothing here does.

    measured: in words.
    """

    says: str
    rivals: tuple[Rival, ...]
    kinds: tuple[str, ...]
    measured: str


CLAIMS = (
    Claim("lower perplexity under Chinchilla scaling laws", RIVALS, ("lm",), "bits per byte, of each text and size"),
    Claim("better in multi-query associative recall", RIVALS, RECALL, "accuracy of far questions, of each task"),
    Claim(
        "better at needles in a haystack, at 1.7 billion parameters", RIVALS[:1], ("niah",),
        "accuracy of digits, at each length",
    ),
    Claim("better in standard benchmarks, at 1.7 billion parameters", RIVALS[:1], (), ""),
)  # fmt: skip


def claims_table(experiments: Sequence[Experiment]) -> str:
    """Markdown: a row per claim and rival, a column per own mixer."""
    lines = [
        f"| the paper: DMA is | than | measured here | {' | '.join(OWN)} |",
        f"|---|---|---|{'---|' * len(OWN)}",
    ]
    for claim in CLAIMS:
        for rival in claim.rivals:
            cells = [compared(experiments, claim, own, rival.mixer) for own in OWN]
            measured = claim.measured or "nothing"
            lines.append(f"| {claim.says} | {rival.name} (`{rival.mixer}`) | {measured} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compared(experiments: Sequence[Experiment], claim: Claim, own: str, rival: str) -> str:
    """How an own mixer compares in all experiments that have both, in words; UNMEASURED where none has.

    A difference counts where it exceeds the sum of both standard deviations over seeds.
    """
    pairs = list(_pairs(experiments, claim, own, rival))
    if not pairs:
        return UNMEASURED
    lower_is_better = claim.kinds == ("lm",)
    better = worse = 0
    for ours, theirs in pairs:
        gain = (fmean(theirs) - fmean(ours)) * (1 if lower_is_better else -1)
        spread = pstdev(ours) + pstdev(theirs)
        better += gain > spread
        worse += -gain > spread
    verdict = {
        (True, False): "agrees",
        (False, True): "disagrees",
        (True, True): "mixed",
        (False, False): "no difference",
    }
    means = [fmean(map(fmean, side)) for side in zip(*pairs, strict=True)]
    counts = f"better in {better}, worse in {worse} of {len(pairs)}; mean {means[0]:.3f} against {means[1]:.3f}"
    return f"**{verdict[better > 0, worse > 0]}**: {counts}"


def _pairs(
    experiments: Sequence[Experiment], claim: Claim, own: str, rival: str
) -> Iterator[tuple[list[float], list[float]]]:
    """(ours, theirs), each a number per seed, of each measurement."""
    for experiment in experiments:
        ours, theirs = experiment.row(own), experiment.row(rival)
        if experiment.kind in claim.kinds and ours is not None and theirs is not None:
            yield from zip(_measured(experiment, ours), _measured(experiment, theirs), strict=True)


def _measured(experiment: Experiment, row: Row) -> list[list[float]]:
    """[measurements][seeds]."""
    if experiment.kind == "lm":
        return [row.bits]
    if experiment.kind == "niah":
        return [list(seeds) for seeds in zip(*row.probed("overall"), strict=True)]
    return [row.far]
