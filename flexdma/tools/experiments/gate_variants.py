"""Variants of DMA's gate, compared as mixers: forms, initial A, recencies, and selections."""

from collections.abc import Mapping

import torch
from torch import nn

from flexdma import DynamicMaskAttention
from flexdma.tools.experiments.mixers import MIXERS, Mixer, ModelSizes, make_mixer

PAPER = "arXiv 2508.02124"
FORMS = {"exp": "exp(A softplus(v Δ))", "linear": "A softplus(v Δ)", "identity": "A v Δ"}


def _variant(form: str, initial: float, recency: str | None = None, selection: str = "causal") -> Mixer:
    """initial: of A in all heads."""

    def make(sizes: ModelSizes) -> nn.Module:
        slopes = sizes.slopes if recency == "slope" else None
        layer = DynamicMaskAttention(
            sizes.width, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.window, qk_norm=True, form=form,
            recency=recency, slopes=slopes, selection=selection,
        )  # fmt: skip
        with torch.no_grad():
            layer.gate.A.fill_(initial)
        return layer

    sees = f"the w best-gated keys {'of the whole sequence' if selection == 'global' else 'so far'}; {FORMS[form]}"
    sees += {None: "", "slope": "; slope · j", "forget": "; forget gates"}[recency]
    return Mixer(make, True, f"{sees}; A starts at {initial:g}", PAPER if recency is None else "this project")


GATE_VARIANTS: Mapping[str, Mixer] = {
    "exp": _variant("exp", 0.0),
    "linear": _variant("linear", 0.0),
    "identity": _variant("identity", 0.0),
    "exp from 1": _variant("exp", 1.0),
    "linear from 1": _variant("linear", 1.0),
    "identity from 1": _variant("identity", 1.0),
    "exp global": _variant("exp", 0.0, selection="global"),
    "linear from 1 global": _variant("linear", 1.0, selection="global"),
    "exp + slope": _variant("exp", 0.0, "slope"),
    "linear from 1 + slope": _variant("linear", 1.0, "slope"),
    "exp + forget": _variant("exp", 0.0, "forget"),
    "linear from 1 + forget": _variant("linear", 1.0, "forget"),
}

CANDIDATES: Mapping[str, Mixer] = {**MIXERS, **GATE_VARIANTS}


def make_candidate(name: str, sizes: ModelSizes) -> nn.Module:
    """The layer of a mixer or of a variant of the gate.  Raises ValueError for other names."""
    return GATE_VARIANTS[name].make(sizes) if name in GATE_VARIANTS else make_mixer(name, sizes)
