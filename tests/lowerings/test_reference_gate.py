"""The reference of one document in one cumulative pass, compared with that of any documents."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.lifespans import Selection
from flexdma.lowerings.reference_gate import largest_so_far, reference_gate

# Beyond float32's range no difference of gates is finite.  A query that sees infinity or NaN gets NaN by any reference.
GATES = st.sampled_from([float("-inf"), -0.0, 0.0, 1.0, 1.0 + 2**-30, -1e6, 3.4e38])
SELECTIONS = st.sampled_from(
    [("causal", 3, 0, 0), ("causal", 2, 1, 2), ("global", 3, 1, 0), ("threshold", 2, 0, 0), ("threshold", None, 2, 0),
     ("full", None, 0, 0)]
)  # fmt: skip


@given(
    st.lists(GATES, min_size=1, max_size=30),
    SELECTIONS,
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_one_document_has_the_reference_of_any(gates, selection, padding, dtype):
    gate = torch.tensor(gates, dtype=torch.float64).to(dtype).expand(1, 1, -1)
    real = torch.arange(len(gates))[None] >= padding
    alive = Selection.of(*selection, heads=1).lifespans(gate, key_padding_mask=real)
    torch.testing.assert_close(largest_so_far(gate, alive), reference_gate(gate, alive).float(), rtol=0, atol=0)
