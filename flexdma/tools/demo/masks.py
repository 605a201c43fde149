"""What the trained gates keep: lifespans, visible keys per query, the share of keys never seen."""

import torch
from torch import Tensor

from flexdma import Lifespans
from flexdma.plots import TileMaps, never_visible, tile_maps, visited
from flexdma.tools.byte_models.model import ByteModel, layer_gates
from flexdma.tools.demo.training import Course


def layer_lifespans(model: ByteModel, tokens: Tensor) -> list[Lifespans]:
    """Birth and death [B, Hkv, N] of each layer."""
    return [alive for _, alive in layer_gates(model, tokens)]


def visible_keys_per_query(model: ByteModel, windows: Tensor) -> float:
    """The mean over queries, heads and layers of how many keys a query sees, over windows [n, context + 1]."""
    tokens = windows[:, :-1].to(model.embedding.weight.device)
    lifetimes = [(death - birth).float() for birth, death in layer_lifespans(model, tokens)]
    # Summed over keys, lifetimes count the visible pairs.
    return torch.stack(lifetimes).mean().item()


class SparsityRecord:
    """What share of the keys no query sees, per layer and head, at every `every`-th step of a training and its last."""

    def __init__(self, model: ByteModel, windows: Tensor, steps: int, every: int) -> None:
        self.model, self.steps, self.every = model, steps, every
        self.tokens = windows[:, :-1].to(model.embedding.weight.device)

    def __call__(self, course: Course) -> None:
        """After a step: writes into the course."""
        step = len(course.losses)
        if step == 1 or step % self.every == 0 or step == self.steps:
            course.recorded_steps.append(step)
            course.never_visible.append(never_visible(layer_lifespans(self.model, self.tokens)).tolist())


def most_scattered_head(layers: list[Lifespans], window: int, block: int) -> tuple[int, int, TileMaps]:
    """(layer, head, its tile maps) of the head that visits most tiles: where packing has most to do."""
    candidates = [
        (layer, head, tile_maps(Lifespans(alive.birth[0, head], alive.death[0, head]), window, block))
        for layer, alive in enumerate(layers)
        for head in range(alive.birth.shape[1])
    ]
    return max(candidates, key=lambda candidate: visited(candidate[2].natural))
