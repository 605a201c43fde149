"""A small picture of each mask: keys across, queries down."""

from functools import partial
from pathlib import Path

import torch
from matplotlib.image import imsave

from flexdma.atomic_write import atomic_write
from flexdma.plots.colours import KEPT
from flexdma.tools.gate_families import gate_families
from flexdma.tools.policies.examples import Scores
from flexdma.tools.policies.measure import visible
from flexdma.tools.policies.systems import System

LENGTH, WINDOW, BLOCK = 192, 32, 16
FAMILY = "iid"


def draw(system: System, folder: Path) -> Path:
    """Write the picture of a system that has an example, and return its path."""
    assert system.example is not None
    mask = system.example(Scores(gate_families(LENGTH)[FAMILY][None, None], WINDOW, BLOCK))
    colour = torch.tensor([int(KEPT[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    seen = visible(mask, LENGTH)
    # Transparent where nothing is seen, so that a light and a dark page show through.
    image = torch.cat([colour.expand(LENGTH, LENGTH, 3), seen[..., None] * 0.9 + 0.1], -1)
    path = folder / f"{system.slug}.png"
    atomic_write(path, partial(imsave, arr=image.numpy(), format="png"))
    return path
