"""What the trained gates keep: lifespans, visible keys per query, tiles visited before and after packing."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma import Lifespans, pack
from flexdma.block_metadata import block_metadata
from flexdma.demo.attentions import lifespans_of
from flexdma.demo.model import ByteModel, recorded_gates

SKIPPED, PARTIAL, FULL = 0, 1, 2  # values of a tile map


class TileMaps(NamedTuple):
    """SKIPPED, PARTIAL or FULL for each tile [query blocks, key blocks] of one head, keys in two orders."""

    natural: Tensor
    packed: Tensor


@torch.no_grad()
def layer_lifespans(model: ByteModel, tokens: Tensor) -> list[Lifespans]:
    """Birth and death [B, Hkv, N] of each layer, for the model run over tokens [B, N]; N may exceed its context."""
    with recorded_gates(model) as gates:
        model(tokens)
    return [lifespans_of(model.kind, gate, model.sizes.window) for gate in gates]


def visible_keys_per_query(model: ByteModel, windows: Tensor) -> float:
    """The mean over queries, heads and layers of how many keys a query sees, over windows [n, context + 1]."""
    tokens = windows[:, :-1].to(model.embedding.weight.device)
    lifetimes = [(death - birth).float() for birth, death in layer_lifespans(model, tokens)]
    # Summed over keys, lifetimes count the visible pairs.
    return torch.stack(lifetimes).mean().item()


def tile_maps(lifespans: Lifespans, window: int, block: int) -> TileMaps:
    """Which tiles a kernel visits for one head; birth, death [N]."""
    one = Lifespans(*(t.view(1, 1, -1).cpu() for t in lifespans))
    order = pack(one, window)
    packed = Lifespans(*(t.gather(-1, order) for t in one))
    return TileMaps(_tile_map(one, block), _tile_map(packed, block))


def most_scattered_head(layers: list[Lifespans], window: int, block: int) -> tuple[int, int, TileMaps]:
    """(layer, head, its tile maps) of the head that visits most tiles: where packing has most to do."""
    candidates = [
        (layer, head, tile_maps(Lifespans(alive.birth[0, head], alive.death[0, head]), window, block))
        for layer, alive in enumerate(layers)
        for head in range(alive.birth.shape[1])
    ]
    return max(candidates, key=lambda candidate: visited(candidate[2].natural))


def visited(tiles: Tensor) -> int:
    """How many tiles a kernel computes."""
    return int((tiles != SKIPPED).sum())


def _tile_map(lifespans: Lifespans, block: int) -> Tensor:
    length = lifespans.birth.shape[-1]
    counts = block_metadata(lifespans.birth, lifespans.death, length, 1, block, block, False)
    number, indices, full_number, full_indices = (t[0, 0].long() for t in counts)
    tiles = torch.full(indices.shape, SKIPPED)
    place = torch.arange(tiles.shape[-1])
    for count, index, mark in ((number, indices, PARTIAL), (full_number, full_indices, FULL)):
        chosen = torch.zeros_like(tiles, dtype=torch.bool).scatter_(-1, index, place < count[:, None])
        tiles[chosen] = mark
    return tiles
