"""The reference of one document in one cumulative pass, compared with that of any documents."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import causal_top_w
from flexdma.lowerings.reference_gate import largest_so_far, reference_gate

# Beyond float32's range no difference of gates is finite.  A query that sees infinity or NaN gets NaN by any reference.
GATES = st.sampled_from([float("-inf"), -0.0, 0.0, 1.0, 1.0 + 2**-30, -1e6, 3.4e38])


@given(st.lists(GATES, min_size=1, max_size=30), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_one_document_has_the_reference_of_any(gates, window, dtype):
    gate = torch.tensor(gates, dtype=torch.float64).to(dtype).expand(1, 1, -1)
    alive = causal_top_w(gate, window)
    torch.testing.assert_close(largest_so_far(gate, alive), reference_gate(gate, alive).float(), rtol=0, atol=0)
