"""The keys that can be seen again, and how they are carried on.

dynamic_mask_state.py   DynamicMaskState
carry.py                a state before new keys, and the state after them
decoding.py             one new token
files.py                states as safetensors files
"""

from flexdma.state.dynamic_mask_state import (
    STATEFUL_SELECTIONS,
    DynamicMaskState,
    as_window,
    check_state_matches,
    widest_window,
)
from flexdma.state.files import load_states, save_states

__all__ = [
    "STATEFUL_SELECTIONS",
    "DynamicMaskState",
    "as_window",
    "check_state_matches",
    "load_states",
    "save_states",
    "widest_window",
]
