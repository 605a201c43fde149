"""The keys that can be seen again, and how they are carried on.

dynamic_mask_state.py   DynamicMaskState
layout.py               its tensors, and how two states differ
carry.py                a state before new keys, and the state after them
rollback.py             a state before its last tokens
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
