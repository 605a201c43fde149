"""The keys that trained gates keep: lifespans, visible keys per query, the share of keys that no query sees."""

import torch
from torch import Tensor

from flexdma import Lifespans
from flexdma.plots import TileMaps, never_visible, tile_maps, visited
from flexdma.tools.byte_models.model import ByteModel, layer_gates
from flexdma.tools.demo.training import Course


def layer_lifespans(model: ByteModel, tokens: Tensor) -> list[Lifespans]:
    """The lifespans [B, Hkv, N] of each layer."""
    return [alive for _, alive in layer_gates(model, tokens)]


def visible_keys_per_query(model: ByteModel, windows: Tensor) -> float:
    """The mean number of keys that a query sees, over queries, heads, layers and windows [n, context + 1]."""
    tokens = windows[:, :-1].to(model.embedding.weight.device)
    lifetimes = [(death - birth).float() for birth, death in layer_lifespans(model, tokens)]
    # The sum of lifetimes over keys is the number of visible pairs.
    return torch.stack(lifetimes).mean().item()


class SparsityRecord:
    """A watcher that records the share of keys that no query sees, per layer and head, every `every` steps and at the end."""

    def __init__(self, model: ByteModel, windows: Tensor, steps: int, every: int) -> None:
        self.model, self.steps, self.every = model, steps, every
        self.tokens = windows[:, :-1].to(model.embedding.weight.device)

    def __call__(self, course: Course) -> None:
        """Write to the course after a step."""
        step = len(course.losses)
        if step == 1 or step % self.every == 0 or step == self.steps:
            course.recorded_steps.append(step)
            course.never_visible.append(never_visible(layer_lifespans(self.model, self.tokens)).tolist())


def most_scattered_head(layers: list[Lifespans], window: int, block: int) -> tuple[int, int, TileMaps]:
    """(layer, head, its tile maps) of the head that visits most tiles in natural order."""
    candidates = [
        (layer, head, tile_maps(Lifespans(alive.birth[0, head], alive.death[0, head]), window, block))
        for layer, alive in enumerate(layers)
        for head in range(alive.birth.shape[1])
    ]
    return max(candidates, key=lambda candidate: visited(candidate[2].natural))
