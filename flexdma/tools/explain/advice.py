"""Advice from counts and predictions: one sentence for each observation."""

from dataclasses import dataclass

from flexdma.tools.cost_model.counts import BlockCounts, KeyCounts
from flexdma.tools.explain.report import Prediction

STATIC = 1.5  # a selection is static if fewer keys are ever visible than this times the keys of one query
LONG = 4  # windows; shorter sequences do not show whether a selection is static
RARELY = 0.5  # share of keys ever visible below which many queries do not see their own key
GOOD_ORDER = 1.1  # blocks visited in natural order over packed ones, below which packing is not needed


@dataclass(frozen=True)
class Situation:
    """The observations for advice."""

    selection: str
    length: int
    capacity: int
    always: int  # sinks + recent
    longest_document: int
    evicted: int  # keys that the selection evicted before the end of their document
    is_sliding_window: bool
    keys: KeyCounts
    natural: BlockCounts
    packed: BlockCounts
    predictions: list[Prediction]


def advise(situation: Situation) -> list[str]:
    """The sentences that apply, the most important first."""
    rules = (_nothing_visible, _never_fires, _sliding, _static, _unseen, _does_not_pay, _good_order)
    return [sentence for rule in rules if (sentence := rule(situation))]


def _nothing_visible(s: Situation) -> str | None:
    if s.keys.ever_visible:
        return None
    return "no query sees any key: every gate is -inf, padded or below the threshold, and the output is 0"


def _never_fires(s: Situation) -> str | None:
    if s.evicted or not s.keys.ever_visible:
        return None
    why = (
        f"the longest document has {s.longest_document:,} tokens, not more than the {s.capacity:,} that a query may see"
        if s.longest_document <= s.capacity
        else "every gate passes"
    )
    return (
        f"the selection never evicts a key ({why}): this is full causal attention with a bias, and a gate trained "
        "here learns no selection.  Use a smaller window or longer documents"
    )


def _sliding(s: Situation) -> str | None:
    if not s.evicted or not s.is_sliding_window:
        return None
    return (
        "the mask is exactly a sliding window: gates are constant (A = 0, where training starts) or rise with position.  "
        "While this holds, flexdma.sliding_window gives the same mask without ranking"
    )


def _static(s: Situation) -> str | None:
    moves = s.keys.ever_visible >= STATIC * s.keys.visible_per_query
    if s.selection != "causal" or not s.evicted or moves or s.length < LONG * s.capacity:
        return None
    return (
        f"the selection is static: {s.keys.ever_visible:,.0f} keys are ever visible and a query sees "
        f"{s.keys.visible_per_query:,.0f}, so the first keys stay and few newer tokens are seen.  "
        'Use recency="slope" or "forget" in the gate, or recent=...'
    )


def _unseen(s: Situation) -> str | None:
    if s.selection != "causal" or not s.keys.ever_visible or s.keys.share > RARELY or s.always:
        return None
    return (
        f"{1 - s.keys.share:.0%} of the keys are outranked on arrival, so many queries do not even see their own "
        'token: with recency="slope" or "forget" gates can prefer recent keys, and recent=... keeps the last ones'
    )


def _does_not_pay(s: Situation) -> str | None:
    losing = [p for p in s.predictions if not p.pays]
    if not losing or not s.evicted:
        return None
    names = ", ".join(f"{p.lowering} {p.phase}" for p in losing)
    windows = [p.break_even_window for p in losing if p.break_even_window]
    lengths = [p.break_even_length for p in losing if p.break_even_length]
    remedies = [f"a window of at most {min(windows):,}"] if windows else []
    remedies += [f"a context of at least {max(lengths):,}"] if lengths else []
    return f"predicted slower than full attention ({names}): use {' or '.join(remedies) or 'another lowering'}"


def _good_order(s: Situation) -> str | None:
    if not s.keys.ever_visible or s.natural.visited > GOOD_ORDER * s.packed.visited:
        return None
    return (
        f"the natural order is already good ({s.natural.over_ideal:.2f} x ideal, packed {s.packed.over_ideal:.2f} x): "
        "flexdma.block_masks.dynamic_block_mask with plain FlexAttention skips as many blocks without packing keys"
    )
