"""Mixers: the attentions that are compared, by name, with one interface.

    mixer(hidden states [B, N, width], (cos, sin) [N, head_dim]) -> [B, N, width]

Own mixers have the projections, query-key normalisation, rotary embedding and grouped heads of `DynamicMaskAttention`,
where their papers do not have others.  They differ in the keys that a query sees and in what is added to the logits.
A mixer may have an `auxiliary_loss`, which training adds to the task's.

mixer.py      a row of the comparison; the sizes
layers.py     `DynamicMaskAttention`: full, windows, keys chosen by gates
latent.py     multi-head latent attention, full and with gates
routed.py     blocks of keys that queries choose: MoBA, and the base of the next
seer.py       SeerAttention's gate
nsa.py        Native Sparse Attention
packages.py   whole mechanisms of other packages
table.py      the names
"""

from flexdma.tools.experiments.mixers.mixer import Mixer, ModelSizes
from flexdma.tools.experiments.mixers.table import MIXERS, make_mixer, needed, not_installed

__all__ = ["MIXERS", "Mixer", "ModelSizes", "make_mixer", "needed", "not_installed"]
