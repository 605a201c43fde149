"""Variants of DMA's gate, compared as mixers: forms, initial A, recencies, and selections."""

from collections.abc import Mapping

from torch import nn

from flexdma.tools.experiments.mixers import MIXERS, Mixer, ModelSizes, make_mixer
from flexdma.tools.experiments.mixers.layers import dynamic
from flexdma.tools.experiments.mixers.table import PAPER

FORMS = {"exp": "exp(A softplus(v Δ))", "linear": "A softplus(v Δ)", "identity": "A v Δ"}


def _variant(form: str, initial: float, recency: str | None = None, selection: str = "causal") -> Mixer:
    """initial: of A in all heads."""
    make_layer = dynamic(form=form, recency=recency, selection=selection)

    def make(sizes: ModelSizes) -> nn.Module:
        layer = make_layer(sizes)
        nn.init.constant_(layer.gate.A, initial)
        return layer

    sees = f"the w best-gated keys {'of the whole sequence' if selection == 'global' else 'so far'}; {FORMS[form]}"
    sees += {None: "", "slope": "; slope · j", "forget": "; forget gates"}[recency]
    return Mixer(make, True, f"{sees}; A starts at {initial:g}", PAPER if recency is None else "this project")


STARTS = {
    "exp": ("exp", 0.0), "exp from 1": ("exp", 1.0), "linear from 1": ("linear", 1.0), "identity": ("identity", 0.0),
    "identity from 1": ("identity", 1.0),
}  # fmt: skip

GATE_VARIANTS: Mapping[str, Mixer] = {
    f"{name}{suffix}": _variant(form, initial, recency)
    for recency, suffix in ((None, ""), ("slope", " + slope"), ("forget", " + forget"))
    for name, (form, initial) in STARTS.items()
} | {
    "exp global": _variant("exp", 0.0, selection="global"),
    "identity from 1 global": _variant("identity", 1.0, selection="global"),
}

CANDIDATES: Mapping[str, Mixer] = {**MIXERS, **GATE_VARIANTS}


def make_candidate(name: str, sizes: ModelSizes) -> nn.Module:
    """The layer of a mixer or of a variant of the gate.  Raises ValueError for other names."""
    return GATE_VARIANTS[name].make(sizes) if name in GATE_VARIANTS else make_mixer(name, sizes)
