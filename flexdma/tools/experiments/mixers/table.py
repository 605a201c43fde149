"""The mixers by name."""

from collections.abc import Iterable, Mapping

from torch import nn

from flexdma.tools.experiments.mixers import latent, layers
from flexdma.tools.experiments.mixers.mixer import Mixer, ModelSizes
from flexdma.tools.experiments.mixers.nsa import NativeSparseAttention
from flexdma.tools.experiments.mixers.packages import Doge, NativeSparseAttentionPackage
from flexdma.tools.experiments.mixers.routed import MoBA
from flexdma.tools.experiments.mixers.seer import SeerAttention
from flexdma.tools.refusal import RefusedError

PAPER = "arXiv 2508.02124"

MIXERS: Mapping[str, Mixer] = {
    "full": Mixer(layers.full(), False, "all earlier keys", "arXiv 1706.03762"),
    "full + slope": Mixer(layers.full_with("slope"), False, "all earlier keys; slope · j", "arXiv 2108.12409"),
    "FoX": Mixer(layers.full_with("forget"), False, "all earlier keys; forget gates", "arXiv 2503.02130"),
    "gated": Mixer(layers.full(output_gate=True), False, "all earlier keys; the output gated", "arXiv 2505.06708"),
    "SQA": Mixer(layers.half_of_the_heads, False, "all earlier keys, by half of the query heads", "arXiv 2510.01817"),
    "MLA": Mixer(latent.latent(), False, "all earlier tokens, as latents", "arXiv 2405.04434"),
    "window": Mixer(layers.window(), True, "the last w keys", "arXiv 1904.10509"),
    "sinks + window": Mixer(layers.window(sinks=4), True, "the first 4 keys and the last w - 4", "arXiv 2309.17453"),
    "MoA": Mixer(
        layers.moa, True, "the first w / 8 and the last keys, w / 2 to 3 w / 2 by head", "arXiv 2406.14909",
    ),
    "DMA": Mixer(layers.dynamic(form="exp"), True, "the w best-gated keys so far; exp(A softplus(v Δ))", PAPER),
    "DMA global": Mixer(
        layers.dynamic(form="exp", selection="global"), True,
        "the w best-gated keys of the whole sequence, later ones included in the choice", PAPER,
    ),
    "DMA threshold": Mixer(layers.threshold, False, "its own key and the earlier ones with a gate above 0", PAPER),
    "DMA identity": Mixer(layers.dynamic(), True, "the w best-gated keys so far; A v Δ", "this project"),
    "DMA + slope": Mixer(
        layers.dynamic(recency="slope"), True, "the w best-gated keys so far; A v Δ + slope · j", "this project"
    ),
    "DMA + forget": Mixer(
        layers.dynamic(recency="forget"), True, "the w best-gated keys so far; A v Δ + forget gates", "this project"
    ),
    "DMA recent": Mixer(
        layers.dynamic(recent_part=4), True, "the last w / 4 keys and the best-gated others; A v Δ", "this project"
    ),
    "DMA recent + slope": Mixer(
        layers.dynamic(recent_part=4, recency="slope", recency_ranks=False), True,
        "the last w / 4 keys and the best-gated others; A v Δ + slope · j, ranked by A v Δ", "this project",
    ),
    "DMA recent + forget": Mixer(
        layers.dynamic(recent_part=4, recency="forget", recency_ranks=False), True,
        "the last w / 4 keys and the best-gated others; A v Δ + forget gates, ranked by A v Δ", "this project",
    ),
    "MLA + DMA": Mixer(latent.dynamic_latent(), True, "the w best-gated tokens so far, as latents", "this project"),
    "MoBA": Mixer(MoBA, True, "its own chunk of w / 4 keys and the 3 best earlier ones", "arXiv 2502.13189"),
    "SeerAttention": Mixer(
        SeerAttention, True, "its own block of w / 4 keys and the 3 earlier ones that a distilled gate scores best",
        "arXiv 2506.08889",
    ),
    "NSA": Mixer(
        NativeSparseAttention, False, "6 blocks of w / 8 keys, the last w / 4 keys, and summaries of all earlier keys",
        "arXiv 2502.11089",
    ),
    "NSA lucidrains": Mixer(
        NativeSparseAttentionPackage, False, "as NSA, by native-sparse-attention-pytorch", "arXiv 2502.11089",
        package="native_sparse_attention_pytorch",
    ),
    "Doge": Mixer(Doge, True, "the w best-gated keys so far, by transformers", PAPER, package="transformers"),
}  # fmt: skip


def not_installed(names: Iterable[str]) -> list[str]:
    """Those of these MIXERS whose package is not installed."""
    return [name for name in names if not MIXERS[name].is_installed]


def needed(names: Iterable[str]) -> str:
    """What these mixers need, and the command that installs it."""
    return f"{', '.join(f'{name} needs {MIXERS[name].package}' for name in names)}: pip install flexdma[mixers]"


def make_mixer(name: str, sizes: ModelSizes) -> nn.Module:
    """The layer of one of MIXERS.  Raises ValueError for other names, and RefusedError where its package is missing."""
    if name not in MIXERS:
        raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {name!r}")
    if not MIXERS[name].is_installed:
        raise RefusedError(f"mixer: {needed([name])}")
    return MIXERS[name].make(sizes)
