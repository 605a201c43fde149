"""What is measured, and the tokens for it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from flexdma.tools.long_context.needles import Needle, depths, needles
from flexdma.tools.long_context.texts import stretches


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurement.

    lengths: of contexts, in tokens; the longest is that of the stretches.  needles: depths for each seed, length and kind.
    stretches: of each text.  rounds: of timing; 0 = none.  keys: of a bounded contender per KV head, sinks included.
    """

    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    needles: int
    seeds: tuple[int, ...]
    stretches: int
    rounds: int
    keys: int

    def __post_init__(self) -> None:
        if max(self.lengths) <= self.keys:
            raise ValueError(
                f"--lengths: expected one of more than {self.keys} tokens, which is --budget and --sinks, got "
                f"{max(self.lengths)} at most"
            )


class Material(NamedTuple):
    """Tokens to measure on.

    stretches: by text, [1, length] each.  timed: by length, [1, length].
    """

    stretches: dict[str, list[Tensor]]
    needles: list[Needle]
    timed: dict[int, Tensor]

    def tokens(self, rounds: int) -> int:
        """Tokens of all forward passes of one contender."""
        read = sum(stretch.shape[1] for found in self.stretches.values() for stretch in found)
        return read + sum(needle.length for needle in self.needles) + (rounds + 1) * sum(self.timed)


def material(tokenizer: Any, texts: dict[str, Tensor], plan: Plan) -> Material:
    """The tokens of a plan.  texts: token ids [T] by name.  Raises ValueError where a needle does not fit into its length."""
    longest = max(texts.values(), key=len)
    made = needles(
        tokenizer, list(texts.values()), kinds=plan.kinds, lengths=plan.lengths, depths=depths(plan.needles),
        seeds=plan.seeds,
    )  # fmt: skip
    return Material(
        {name: stretches(tokenizer, ids, max(plan.lengths), plan.stretches) for name, ids in texts.items()},
        list(made) if plan.needles else [],
        {length: longest[None, :length] for length in plan.lengths} if plan.rounds else {},
    )
