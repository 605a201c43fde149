"""Which key is visible to which query: systems of the literature as functions that return `Lifespans`.

Policies that rank gates (`causal_top_w` and others) are in `flexdma.lifespans`.
"""

from flexdma.policies.dms import dms_lifespans
from flexdma.policies.dms_training import dms_training_lifespans
from flexdma.policies.flash_mask import flash_mask_lifespans
from flexdma.policies.fox import fox_delta, fox_lifespans
from flexdma.policies.fsa import fsa_lifespans
from flexdma.policies.h2o import h2o_lifespans
from flexdma.policies.hax import hax_lifespans
from flexdma.policies.kvzap import kvzap_lifespans
from flexdma.policies.moa import moa_lifespans
from flexdma.policies.snapkv import snapkv_lifespans
from flexdma.policies.streaming_llm import streaming_llm_lifespans
from flexdma.policies.trim_kv import trim_kv_lifespans

__all__ = [
    "dms_lifespans",
    "dms_training_lifespans",
    "flash_mask_lifespans",
    "fox_delta",
    "fox_lifespans",
    "fsa_lifespans",
    "h2o_lifespans",
    "hax_lifespans",
    "kvzap_lifespans",
    "moa_lifespans",
    "snapkv_lifespans",
    "streaming_llm_lifespans",
    "trim_kv_lifespans",
]
