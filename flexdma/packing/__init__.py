"""Lifespans -> places of the keys, and the blocks that a kernel visits.

places.py           the place of each key, in periods
counting.py         binary search in rows
block_index.py      the blocks to visit, and which of them need no mask
schedule.py         both in one operator
choice.py           whether packing visits fewer blocks than the order that the keys have
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
