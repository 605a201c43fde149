"""The masks of the systems for given scores: each function takes scores and sizes, and returns what the system makes.

Functions are looked up where they are called, so that a row is open where this version lacks its function.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import flexdma
from flexdma import Lifespans

DIM = 32
SINKS = 4


class Scores(NamedTuple):
    """What the systems read of one sequence, in one head.

    gate: [1, 1, K] float64, a family of gates.  window: keys that a query may see.  block: of masks that are made in blocks.
    """

    gate: Tensor
    window: int
    block: int

    @property
    def length(self) -> int:
        """K."""
        return self.gate.shape[-1]

    def above_share(self, share: float) -> Tensor:
        """Gates relative to the number that this share of them is above."""
        return (self.gate - self.gate.quantile(1 - share)).float()

    def query_and_key(self) -> tuple[Tensor, Tensor]:
        """[1, 1, K, DIM] each: scores of a key are its gate, and a noise that differs between queries."""
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(1, 1, self.length, DIM, generator=generator) for _ in range(2))
        gate = (self.gate - self.gate.mean()) / self.gate.std()
        query[..., 0], key[..., 0] = DIM**0.5, 2 * gate
        return query, key


Mask = Lifespans | tuple[Lifespans, ...] | BlockMask
Example = Callable[[Scores], Mask]


def _policy(name: str, *arguments: Any, **options: Any) -> Any:
    return _function("flexdma.policies", name)(*arguments, **options)


def _recipe(name: str, *arguments: Any, **options: Any) -> Any:
    return _function("flexdma.block_masks", name)(*arguments, **options)


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def causal(scores: Scores) -> Mask:
    return flexdma.causal_top_w(scores.gate, scores.window)


def whole_text(scores: Scores) -> Mask:
    return flexdma.global_top_w(scores.gate, scores.window)


def threshold(scores: Scores) -> Mask:
    return flexdma.above_threshold(scores.above_share(1 / 8))


def window(scores: Scores) -> Mask:
    return flexdma.sliding_window(scores.gate, scores.window)


def streaming_llm(scores: Scores) -> Mask:
    return _policy("streaming_llm_lifespans", scores.query_and_key()[1], scores.window - SINKS, sinks=SINKS)


def moa(scores: Scores) -> Mask:
    share = scores.window / scores.length / 2
    return _policy("moa_lifespans", scores.query_and_key()[1], [scores.window / 2], [share], sinks=SINKS)


def _documents(length: int) -> Tensor:
    return (torch.arange(length) * 3 // length)[None]


def documents(scores: Scores) -> Mask:
    ones = torch.ones_like(scores.gate)
    return flexdma.above_threshold(ones, document_ids=_documents(scores.length))


def flash_mask(scores: Scores) -> Mask:
    """Causal documents, and a first eighth of all keys that every query sees."""
    ids = _documents(scores.length)
    ends = torch.searchsorted(ids[0], ids[0], right=True)
    ends = torch.where(torch.arange(scores.length) < scores.length // 8, scores.length, ends)
    return _policy("flash_mask_lifespans", ends.int().view(1, 1, -1, 1), causal=True)


def dms(scores: Scores) -> Mask:
    return _policy("dms_lifespans", -scores.above_share(1 / 8), scores.window // 2)


def kvzap(scores: Scores) -> Mask:
    return _policy("kvzap_lifespans", scores.above_share(1 / 8), 0.0, scores.window // 2)


def dms_training(scores: Scores) -> Mask:
    return _intervals(_policy("dms_training_lifespans", -scores.above_share(1 / 8), scores.window // 2))


def fox(scores: Scores) -> Mask:
    log_forget = torch.nn.functional.logsigmoid(scores.gate) * (40 / scores.window)
    return _policy("fox_lifespans", log_forget, -20.0)


def snapkv(scores: Scores) -> Mask:
    query, key = scores.query_and_key()
    return _policy("snapkv_lifespans", query, key, scores.window, prompt_length=scores.length // 2, observed=8)


def h2o(scores: Scores) -> Mask:
    query, key = scores.query_and_key()
    return _policy("h2o_lifespans", query, key, scores.window // 2, scores.window // 2, chunk=scores.window // 8)


def trim_kv(scores: Scores) -> Mask:
    log_beta = torch.nn.functional.logsigmoid(scores.gate + 4)
    return _policy("trim_kv_lifespans", log_beta, scores.window, chunk=max(1, scores.window // 8))


def hax(scores: Scores) -> Mask:
    return _policy("hax_lifespans", scores.gate, scores.window)


def hax_buckets(scores: Scores) -> Mask:
    query, key = scores.query_and_key()
    directions = torch.randn(DIM, 8, generator=torch.Generator().manual_seed(1))
    made = _recipe(
        "hax_block_mask", *(_recipe("hax_buckets", t, directions) for t in (query, key)), block_size=scores.block
    )
    return made.lifespans


def fsa(scores: Scores) -> Mask:
    half = scores.window // 2
    return _intervals(_policy("fsa_lifespans", scores.query_and_key()[1], half, 2 * half, half))


def seer(scores: Scores) -> Mask:
    """The best gate of each block of keys, and a noise that differs between blocks of queries."""
    blocks = -(-scores.length // scores.block)
    padded = torch.nn.functional.pad(scores.gate[0, 0].float(), (0, blocks * scores.block - scores.length))
    noise = torch.randn(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0))
    return _recipe(
        "seer_block_mask", padded.view(blocks, -1).amax(-1) + noise / 2, length=scores.length,
        block_size=scores.block, top_k=max(3, scores.window // scores.block),
    )  # fmt: skip


def moba(scores: Scores) -> Mask:
    chunks = max(1, scores.window // scores.block)
    return _recipe(
        "moba_block_mask", *scores.query_and_key(), chunk_size=scores.block, top_k=chunks, block_size=scores.block
    )


def nsa(scores: Scores) -> Mask:
    query, key = scores.query_and_key()
    compressed = key.unfold(2, 32, 16).mean(-1)
    top_n = max(4, scores.window // scores.block)
    chosen = _recipe(
        "nsa_selection", query, compressed, num_keys=scores.length, selected_size=scores.block, top_n=top_n
    )
    return _recipe(
        "nsa_block_mask",
        chosen,
        num_query_heads=1,
        num_keys=scores.length,
        selected_size=scores.block,
        block_size=scores.block,
    )


def biformer(scores: Scores) -> Mask:
    regions = max(1, scores.length // scores.block)
    return _recipe("biformer_block_mask",
        *scores.query_and_key(), num_regions=regions, top_k=max(1, scores.window // scores.block),
        block_size=scores.block,
    )  # fmt: skip


def _intervals(made: Any) -> tuple[Lifespans, ...]:
    """The lifespans among what a function of several intervals returns, which may have biases beside them."""
    if isinstance(made, Lifespans):
        return (made,)
    parts = made if isinstance(made, tuple | list) else ()
    return tuple(interval for part in parts for interval in _intervals(part))
