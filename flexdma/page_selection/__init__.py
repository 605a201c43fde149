"""Decoding over a full cache: the new token's query picks pages or keys, and attends to the picked keys alone.

pages.py             attend_to_pages, page_bounds
quest.py             Quest: pages by an upper bound on their scores
lserve.py            LServe: pages by the best of their smaller logical pages
double_sparsity.py   Double Sparsity: keys by a few channels

The cache keeps all keys, so none of these bounds memory; they bound what a token reads.
"""

from flexdma.page_selection.double_sparsity import double_sparsity_attention, double_sparsity_channels
from flexdma.page_selection.lserve import lserve_attention, lserve_pages
from flexdma.page_selection.pages import PageBounds, attend_to_pages, page_bounds
from flexdma.page_selection.quest import quest_attention, quest_pages

__all__ = [
    "PageBounds",
    "attend_to_pages",
    "double_sparsity_attention",
    "double_sparsity_channels",
    "lserve_attention",
    "lserve_pages",
    "page_bounds",
    "quest_attention",
    "quest_pages",
]
