"""The keys that later queries can see, and how one call passes them to the next.

dynamic_mask_state.py   DynamicMaskState
layout.py               the tensors of a state, and the check that two states match
carry.py                the keys of a state before new ones, and the state after them
joined.py               the state after two runs of tokens that were read apart
rollback.py             the state before the last tokens
decoding.py             one new token
files.py                states as safetensors files
"""

from flexdma.state.dynamic_mask_state import DynamicMaskState, check_state_matches, state_options
from flexdma.state.files import load_states, save_states

__all__ = [
    "DynamicMaskState",
    "check_state_matches",
    "load_states",
    "save_states",
    "state_options",
]
