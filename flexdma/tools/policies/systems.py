"""One entry for each system: what it selects by, and the functions of this library that make it."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from flexdma.tools.policies import examples
from flexdma.tools.policies.examples import Example

PREFILL, DECODE, TRAINING = "prefill", "decode", "training"
EVERYWHERE = (PREFILL, DECODE, TRAINING)


@dataclass(frozen=True)
class System:
    """A row of the table.

    functions: those that make it, as package.module:name or package.module:name(argument).
    paper: an arXiv number, or "" where there is none.
    bounded: whether a number of keys that does not grow with the text bounds memory.  trainable: whether gradients reach what
        selects.  phases: where the system is meant for.
    example: its mask for some scores; None = it has no mask.
    why: what the functions do not do of the system, or why there is no picture.
    page: where docs describe it; "" = where DOCUMENTED has it.
    """

    name: str
    selects_by: str
    functions: tuple[str, ...]
    paper: str
    bounded: bool
    trainable: bool
    phases: tuple[str, ...] = EVERYWHERE
    example: Example | None = None
    why: str = ""
    page: str = ""

    @property
    def slug(self) -> str:
        """The name in names of files."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())

    @property
    def described(self) -> str:
        """The page of docs that describes it, "" where there is none."""
        return self.page or DOCUMENTED.get(self.functions[0].partition(":")[0], "")

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of its functions that do not exist in this version."""
        return tuple(name for name in self.functions if found(name) is None)

    @property
    def status(self) -> str:
        """Complete, or open and the reason."""
        return f"open: {', '.join(self.missing)} does not exist yet" if self.missing else "complete"


def found(name: str) -> Callable | None:
    """The function `package.module:name`, or `package.module:name(argument)`; None where this version does not have it."""
    module, _, attribute = name.partition(":")
    attribute, _, argument = attribute.rstrip(")").partition("(")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("flexdma"):
            raise
        return None
    if argument and function is not None and argument not in inspect.signature(function).parameters:
        return None
    return function


POLICIES, RECIPES, PAGES = "flexdma.policies", "flexdma.block_masks", "flexdma.page_selection"
# Where docs describe the systems that these modules make.
DOCUMENTED = {
    "flexdma": "reference/lifespans.md", POLICIES: "systems/lifespans.md", RECIPES: "systems/recipes.md",
    PAGES: "systems/recipes.md",
}  # fmt: skip
LAYERS = "systems/layers.md"
LAYER = "flexdma:DynamicMaskAttention({})"
SYSTEMS = (
    System(
        "DMA, causal top-w", "gates of the values: the w best so far",
        ("flexdma:causal_top_w", f"{RECIPES}:dynamic_block_mask"), "2508.02124", True, True, example=examples.causal,
    ),
    System(
        "DMA, global top-w", "gates of the values: the w best of the whole text", ("flexdma:global_top_w",), "2508.02124",
        True, True, (PREFILL, TRAINING), examples.whole_text, "the choice reads later keys, so it is not for decoding",
    ),
    System(
        "DMA, threshold", "gates of the values above a number", ("flexdma:above_threshold",), "2508.02124", False, True,
        example=examples.threshold,
    ),
    System(
        "Sliding window", "position: the last w keys",
        ("flexdma:sliding_window", f"{RECIPES}:sliding_window_mask_mod"), "2004.05150", True, False,
        example=examples.window,
    ),
    System(
        "StreamingLLM", "position: sinks and the last w keys",
        (f"{POLICIES}:streaming_llm_lifespans", f"{RECIPES}:sink_mask_mod"), "2309.17453", True, False,
        example=examples.streaming_llm,
    ),
    System(
        "MoA", "position: per head, a window linear in the length", (f"{POLICIES}:moa_lifespans",), "2406.14909", False,
        False, example=examples.moa,
    ),
    System(
        "Documents", "position: the keys of one's own document", (f"{RECIPES}:document_mask_mod",), "2107.02027", False,
        False, (PREFILL, TRAINING), examples.documents,
        "every policy takes document_ids too",
    ),
    System(
        "FlashMask", "given rows for each key", (f"{POLICIES}:flash_mask_lifespans",), "2410.01359", False, False,
        (PREFILL, TRAINING), examples.flash_mask,
    ),
    System(
        "DMS", "a logit of each key: above 0 it dies after a window", (f"{POLICIES}:dms_lifespans",), "2506.05345", False,
        True, (PREFILL, DECODE), examples.dms,
    ),
    System(
        "DMS, training", "the same logit: a bias of log(1 - sigmoid) after the window",
        (f"{POLICIES}:dms_training_lifespans",), "2506.05345", False, True, (TRAINING,), examples.dms_training,
        page="systems/intervals.md",
    ),
    System(
        "KVzap", "a predicted score: below a threshold a key dies after a window", (f"{POLICIES}:kvzap_lifespans",),
        "2601.07891", False, False, (PREFILL, DECODE), examples.kvzap,
    ),
    System(
        "FoX, adaptive pruning", "forget gates: a key dies when its bias falls below a bound",
        (f"{POLICIES}:fox_lifespans", f"{POLICIES}:fox_delta"), "2504.06949", False, True, example=examples.fox,
    ),
    System(
        "SnapKV", "attention of the prompt's last queries", (f"{POLICIES}:snapkv_lifespans",), "2404.14469", False, False,
        (PREFILL, DECODE), examples.snapkv, "bounds the keys of the prompt; all that is generated stays",
    ),
    System(
        "H2O", "attention received so far, and the last keys", (f"{POLICIES}:h2o_lifespans",), "2306.14048", True, False,
        (PREFILL, DECODE), examples.h2o,
    ),
    System(
        "TRIM-KV", "retention scores that decay with age", (f"{POLICIES}:trim_kv_lifespans",), "2512.03324", True, True,
        example=examples.trim_kv,
    ),
    System(
        "HAX, key selection", "scores of a small network: the w best so far", (f"{POLICIES}:hax_lifespans",),
        "2507.00449", True, True, example=examples.hax,
    ),
    System(
        "HAX, hash buckets", "equal hashes of query and key",
        (f"{RECIPES}:hax_block_mask", f"{RECIPES}:hax_buckets", f"{RECIPES}:HaxMask"), "2507.00449", False, False,
        (PREFILL, TRAINING), examples.hax_buckets, "the mask is of keys sorted by bucket",
    ),
    System(
        "FSA", "position: a near band, a gap, and a distant band", (f"{POLICIES}:fsa_lifespans",), "", True, False,
        example=examples.fsa, why="the masks of the package flash-sparse-attn 2.0",
        page="systems/intervals.md",
    ),
    System(
        "SeerAttention", "pooled queries and keys: top-k blocks, distilled",
        tuple(f"{RECIPES}:{name}" for name in ("seer_block_mask", "SeerGate", "seer_loss", "seer_target")), "2410.13276",
        False, True, (PREFILL, TRAINING), examples.seer,
    ),
    System(
        "MoBA", "mean keys of chunks: the top-k of each query", (f"{RECIPES}:moba_block_mask",), "2502.13189", False, True,
        example=examples.moba,
    ),
    System(
        "NSA, selection", "compressed keys: the top-n blocks of each query and group",
        (f"{RECIPES}:nsa_block_mask", f"{RECIPES}:nsa_selection"), "2502.11089", False, True, (PREFILL, TRAINING),
        examples.nsa, "a reference: a row block visits the union of what its 128 queries choose",
    ),
    System(
        "BiFormer", "mean queries and keys of image regions, in both directions",
        (f"{RECIPES}:biformer_block_mask", f"{RECIPES}:biformer_order"), "2303.08810", False, True, (PREFILL, TRAINING),
        examples.biformer,
    ),
    System(
        "Double Sparsity", "each query: keys by a few channels of the product",
        (f"{PAGES}:double_sparsity_attention", f"{PAGES}:double_sparsity_channels"), "2408.07092", False, False,
        (DECODE,), None, "each query chooses from the full cache, so there is no mask to pack",
    ),
    System(
        "Quest", "each query: pages of keys by an upper bound of the product",
        (f"{PAGES}:quest_attention", f"{PAGES}:quest_pages"), "2406.10774", False, False, (DECODE,), None,
        "each query chooses from the full cache, so there is no mask to pack",
    ),
    System(
        "LServe", "each query: pages by the best of their logical pages",
        (f"{PAGES}:lserve_attention", f"{PAGES}:lserve_pages"), "2502.14866", False, False, (DECODE,), None,
        "each query chooses from the full cache, so there is no mask to pack",
    ),
    System(
        "Gated Attention", "no keys: a sigmoid gate on the output of each head", (LAYER.format("output_gate"),),
        "2505.06708", True, True, why="no mask: output_gate=True of the layer, under any policy", page=LAYERS,
    ),
    System(
        "SQA", "no keys: fewer query heads", (LAYER.format("num_heads"),), "2510.01817", True, True,
        why="no mask: num_heads of the layer, under any policy", page=LAYERS,
    ),
    System(
        "MLA", "gates of the latent, under any policy", ("flexdma:DynamicMaskLatentAttention",), "2405.04434", True, True,
        why="no mask of its own", page=LAYERS,
    ),
)  # fmt: skip
# Public functions of recipes and policies that are parts of several systems.
PARTS = {
    f"{RECIPES}:lifespan_block_mask": "the BlockMask of any lifespans",
    f"{RECIPES}:lifespan_mask_mod": "the mask_mod of any lifespans",
    f"{RECIPES}:routed_block_mask": "the BlockMask of any choice of cells",
    f"{RECIPES}:routed_mask_mod": "the mask_mod of any choice of cells",
    f"{PAGES}:attend_to_pages": "attention to any chosen pages",
    f"{PAGES}:page_bounds": "bounds of pages, for Quest and LServe",
    f"{PAGES}:PageBounds": "what page_bounds returns",
    "flexdma.score_mods:alibi_score_mod": "changes scores by distance, selects no keys",
    "flexdma.score_mods:gate_score_mod": "adds gates to scores, selects no keys",
    "flexdma.score_mods:softcap_score_mod": "bounds scores, selects no keys",
}
