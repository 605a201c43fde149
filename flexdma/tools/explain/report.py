"""The report of `explain`: counts, predictions and advice, as text or JSON."""

import dataclasses
import json
from dataclasses import dataclass

from flexdma.tools.cost_model.counts import BlockCounts, KeyCounts

# Heads are listed when one has this many times the visible keys, or visited blocks, of another.
DIFFERENT = 1.5


@dataclass(frozen=True)
class Prediction:
    """The cost model's prediction for one lowering and phase."""

    lowering: str
    phase: str  # "inference" or "training"
    speedup: float  # over causal attention to all keys
    break_even_length: int | None  # the shortest N at which this window pays
    break_even_window: int | None  # the widest window that pays at this N
    measured_on: str  # the machine on which the model's rates were measured

    @property
    def pays(self) -> bool:
        """Whether Dynamic Mask Attention is predicted to be faster."""
        return self.speedup >= 1


@dataclass(frozen=True)
class Explanation:
    """Counts, predictions and advice.  Keys and blocks are means over batch and heads."""

    batch: int
    heads: int
    query_heads: int
    length: int
    window_size: list[int]  # one, or one per head; empty for a threshold without a window
    selection: str
    device: str
    block_size: tuple[int, int]
    keys: KeyCounts
    natural: BlockCounts
    packed: BlockCounts
    causal_blocks: int  # per KV head
    keys_per_head: list[KeyCounts]
    packed_per_head: list[BlockCounts]
    predictions: list[Prediction]
    advice: list[str]

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        window = ", ".join(map(str, self.window_size)) or "none"
        rows, columns = self.block_size
        lines = [
            f"{self.selection} selection, N = {self.length}, w = {window}, {self.query_heads} query heads on "
            f"{self.heads} gate heads, batch {self.batch}, {self.device}",
            "",
            f"keys ever visible      {self.keys.ever_visible:,.0f} of {self.length:,} ({self.keys.share:.1%})",
            f"lifespan of those      mean {self.keys.mean_lifespan:,.0f}, median {self.keys.median_lifespan:,.0f} steps",
            f"keys that a query sees {self.keys.visible_per_query:,.1f} on average",
            "",
            f"blocks of {rows} rows x {columns} keys, per KV head; a causal mask has {self.causal_blocks:,}",
            _block_line("natural order", self.natural),
            _block_line("packed", self.packed),
            *self._head_lines(),
            "",
            *self._prediction_lines(),
        ]
        if self.advice:
            lines += ["", "advice", *(f"  - {sentence}" for sentence in self.advice)]
        return "\n".join(lines)

    def _head_lines(self) -> list[str]:
        seen = [keys.ever_visible for keys in self.keys_per_head]
        visited = [blocks.visited for blocks in self.packed_per_head]
        if max(seen) <= DIFFERENT * min(seen) and max(visited) <= DIFFERENT * min(visited):
            return []
        lines = ["", "head   ever visible   mean lifespan   seen per query   visited / causal, packed"]
        for head, (keys, blocks) in enumerate(zip(self.keys_per_head, self.packed_per_head, strict=True)):
            lines.append(
                f"{head:4}   {keys.share:12.1%}   {keys.mean_lifespan:13,.0f}   {keys.visible_per_query:14,.1f}   "
                f"{blocks.over_causal:24.1%}"
            )
        return lines

    def _prediction_lines(self) -> list[str]:
        if not self.predictions:
            share = self.packed.over_causal
            return [
                f"no prediction: no rates were measured on {self.device}.  By the number of blocks alone, without the cost",
                f"of a block and of the selection: at most {1 / share if share else float('inf'):.1f} x faster than causal.",
            ]
        lines = ["predicted, compared with causal attention to all keys (a model; measure with the bench command)"]
        for prediction in self.predictions:
            verdict = "pays" if prediction.pays else "does not pay"
            length, window = prediction.break_even_length, prediction.break_even_window
            lines.append(
                f"  {prediction.lowering:6} {prediction.phase:9} {prediction.speedup:6.2f} x, {verdict}; "
                f"this w pays from N = {'never' if length is None else format(length, ',')}, "
                f"this N up to w = {'none' if window is None else format(window, ',')}"
            )
        return [*lines, *sorted({f"  rates from {prediction.measured_on}" for prediction in self.predictions})]


def _block_line(name: str, blocks: BlockCounts) -> str:
    share = blocks.full / blocks.visited if blocks.visited else 0.0
    return (
        f"  {name:14} {blocks.visited:10,.0f} visited = {blocks.over_causal:6.1%} of causal, "
        f"{blocks.over_ideal:.2f} x ideal, {share:.0%} full (no mask), {1 - share:.0%} partial"
    )
