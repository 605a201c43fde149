"""What a mixer is: a row of the comparison, and the sizes that all rows share."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that all mixers of an experiment share.

    window: w, the keys that a query of a bounded mixer sees, sinks included.
    """

    width: int = 64
    layers: int = 1
    heads: int = 2
    kv_heads: int = 2
    window: int = 16

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.width // self.heads

    @property
    def slopes(self) -> list[float]:
        """Initial slopes in logits per token: heads that fall by one over the window's quarter, and over its fourfold."""
        ratios = torch.linspace(2, -2, self.kv_heads) if self.kv_heads > 1 else torch.zeros(1)
        return (2**ratios / self.window).tolist()


class Mixer(NamedTuple):
    """One row of the comparison.

    make: sizes -> layer.  bounded: whether a query sees at most `window` keys, on average over the heads.
    sees: which keys, in words.  source: the paper.  package: the module that the layer comes from; None = this project.
    """

    make: Callable[[ModelSizes], nn.Module]
    bounded: bool
    sees: str
    source: str
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the module that it comes from can be imported."""
        return self.package is None or importlib.util.find_spec(self.package) is not None
