"""What a distillation did."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Distillation:
    """One number per step, in order.

    divergence: KL(full model || model in its windows) per token, in nats.
    ranking: the gates' loss, a divergence from the shares that keys get later; empty without gates.
    windows: keys kept by gate in a head, on average.
    tokens: number of tokens seen.
    model: the model, or the PeftModel around it where adapters were not merged.
    """

    divergence: list[float] = field(default_factory=list)
    ranking: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)
    tokens: int = 0
    model: Any = field(default=None, repr=False)

    @property
    def latest(self) -> dict[str, float]:
        """The losses of the last step, by name."""
        losses = {"divergence": self.divergence, "ranking": self.ranking}
        return {name: values[-1] for name, values in losses.items() if values}
