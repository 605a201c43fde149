"""Hypothesis strategies: gates of all kinds, and options of a selection."""

import torch
from hypothesis import strategies as st

from tests.comparison import inputs

VALUES = {
    "ties": st.sampled_from([-1.0, 0.0, 1.0]),
    "constant": st.just(0.5),
    "floats": st.floats(width=32),  # with -0.0, subnormals, NaN and both infinities
    "special": st.sampled_from([-torch.inf, torch.inf, torch.nan, 0.0, 1.0]),
}


@st.composite
def gates(draw, max_length=40, kinds=(*VALUES, "sorted", "reversed")):
    """[1, 1 or 2, K] float32."""
    kind = draw(st.sampled_from(kinds))
    heads, length = draw(st.integers(1, 2)), draw(st.integers(1, max_length))
    if kind in VALUES:
        rows = [draw(st.lists(VALUES[kind], min_size=length, max_size=length)) for _ in range(heads)]
    else:
        step = 1.0 if kind == "sorted" else -1.0
        rows = [[step * j for j in range(length)]] * heads
    return torch.tensor([rows], dtype=torch.float32)


@st.composite
def selections(draw, length):
    """Keyword arguments of causal_top_w besides the window: sinks, recent, padding, documents."""
    options = {"sinks": draw(st.integers(0, 3)), "recent": draw(st.integers(0, 4))}
    if draw(st.booleans()):
        left, right = draw(st.integers(0, length)), draw(st.integers(0, length))
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[0, min(left, right) : max(left, right)] = True
        options["key_padding_mask"] = mask
    if draw(st.booleans()):
        # An id may return after another document, and then begins a new one.
        options["document_ids"] = torch.tensor(
            [sorted(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))]
        )
        options["document_ids"] %= 3
    return options


def two_sequences(gate, options):
    """float64 query, key, value and gate of two sequences whose gates differ, and in `options` padding and documents.

    gate: [1, 1 or 2, K].  Changes the masks of options in place.
    """
    for name in ("key_padding_mask", "document_ids"):
        if name in options:
            options[name] = torch.cat([options[name], options[name].roll(3, -1)])
    gate = torch.cat([gate, gate.roll(3, -1)])
    heads, length = gate.shape[1:]
    query, key, value, _gate = inputs(2, 4, heads, length, length, 4)
    # The specification adds gates without a reference, so its rounding error grows with the gate.
    return query, key, value, torch.where(gate == -torch.inf, gate, gate.clamp(-1e3, 1e3)).double()
