"""The keys that later queries can see, and how one call passes them to the next.

value.py                State: what all states are
dynamic_mask_state.py   DynamicMaskState: a number of keys that w bounds
growing.py              GrowingState: any number of keys
selected.py             the one of both that belongs to a selection
growing_call.py         attention after a GrowingState, by growing_chunk.py and growing_token.py
layout.py               the tensors of a state, and the check that two states match
carry.py                the keys of a state before new ones, and the state after them
joined.py               the state after two runs of tokens that were read apart
rollback.py             the state before the last tokens
decoding.py             one new token
files.py                states as safetensors files
"""

from flexdma.state.dynamic_mask_state import DynamicMaskState, state_options
from flexdma.state.files import load_states, save_states
from flexdma.state.growing import GrowingState
from flexdma.state.selected import check_state_matches, empty_state
from flexdma.state.value import State

__all__ = [
    "DynamicMaskState",
    "GrowingState",
    "State",
    "check_state_matches",
    "empty_state",
    "load_states",
    "save_states",
    "state_options",
]
