"""Lifespans -> places of the keys, and the blocks that a kernel visits.

places.py           where each key lies, in periods
block_index.py      which blocks are visited, and which of them need no mask
schedule.py         both, as a kernel takes them
"""

from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.places import PERIOD, PERIOD_BLOCKS, Layout, Packing, along_keys, pack, packed_layout

__all__ = [
    "PERIOD",
    "PERIOD_BLOCKS",
    "BlockIndex",
    "Layout",
    "Packing",
    "along_keys",
    "block_index",
    "pack",
    "packed_layout",
]
