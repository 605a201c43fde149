"""The attention that converted layers of transformers call, with and without a cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from flexdma.attention import dynamic_mask_attention
from flexdma.integrations.transformers.cache import DynamicMaskCache
from flexdma.integrations.transformers.documents import (
    packed_documents,
    refuse_growing_cache_after_documents,
    refuse_other_documents,
)
from flexdma.integrations.transformers.key_energies import gate_of
from flexdma.integrations.transformers.masks import NAME, read_light_mask
from flexdma.integrations.transformers.packed_positions import POSITION_DOCUMENTS, position_documents
from flexdma.integrations.transformers.recorded_pass import gated
from flexdma.integrations.transformers.refusals import refuse_arguments, refuse_cache, refuse_traced_cache
from flexdma.score_mods import softcap_score_mod
from flexdma.transforms import can_read

# Arguments of a layer that change nothing in the attention of one token.
PLAIN = frozenset({"position_ids", "cache_position", "use_cache", "sliding_window", POSITION_DOCUMENTS})


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    gate: Callable[..., Tensor],
    cache: object,
    *,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> Tensor:
    """Attention of a layer after its cache was updated: [B, Q, Hq, Dv].

    query [B, Hq, Q, D], key [B, Hkv, K, D], value [B, Hkv, K, Dv]: keys of all tokens, or of the new ones with
        DynamicMaskCache.
    mask: see `light_mask`.  gate: called by `gated`, like `ValueGate`.
    options: window_size, sinks, recent, lowering.
    arguments: other arguments of the layer's call.  `softcap` and `s_aux` (learned sinks) are computed, arguments that would
        change attention are refused, and the rest is ignored.
    """
    if mask is None and not dropout and query.shape[2] == 1 and isinstance(cache, DynamicMaskCache):
        layer = cache.next_layer(module.layer_idx)
        # A decoded token without documents: the first layer checks what is the same in all.
        if layer is not None and PLAIN.issuperset(arguments) and arguments.get(POSITION_DOCUMENTS) is None:
            if module.layer_idx == 0:
                refuse_arguments(module, dropout, arguments)
            output = layer.attend(query, key, value, gate, scale=scaling, key_padding_mask=None, **options)
            return output.transpose(1, 2).contiguous()
    refuse_arguments(module, dropout, arguments)
    refuse_cache(cache, module.layer_idx, key.shape[2])
    refuse_traced_cache(cache, query, options["lowering"])
    options = options | read_light_mask(mask, query.shape[0], key.shape[2])
    past = (
        cache.get_seq_length(module.layer_idx) if isinstance(cache, DynamicMaskCache) else key.shape[2] - query.shape[2]
    )
    documents = packed_documents(arguments, key, past)
    is_packed = documents is not None
    if documents is not None and module.layer_idx == 0:
        refuse_other_documents(arguments, documents)
    if documents is None:
        documents = position_documents(arguments, mask, past)
        is_packed = documents is not None and can_read(documents)
    if documents is not None:
        options["document_ids"] = documents.expand(key.shape[0], -1)
    if isinstance(cache, DynamicCache):
        refuse_growing_cache_after_documents(cache.layers[module.layer_idx], past, is_packed)
    if arguments.get("softcap") is not None:
        options = options | {"score_mod": softcap_score_mod(arguments["softcap"])}
    if arguments.get("s_aux") is not None:
        options = options | {"sink_logits": arguments["s_aux"]}
    if isinstance(cache, DynamicMaskCache):
        output = cache.attend(module.layer_idx, query, key, value, gate, scale=scaling, **options)
    else:
        gates, bias, _ = gated(gate, value, None, options["key_padding_mask"], keeps_sum=False)
        output = dynamic_mask_attention(query, key, value, gates, bias=bias, scale=scaling, **options)
    return output.transpose(1, 2).contiguous()


def attention_interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    dynamic_mask_cache: object = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, for layers to which `convert_to_dma` added a `value_gate`."""
    if not hasattr(module, "value_gate"):
        raise TypeError(
            f"attn_implementation: expected a converted model for 'flexdma', got {type(module).__name__} without gates"
        )
    output = attend(
        module, query, key, value, attention_mask, gate_of(module.value_gate, key), dynamic_mask_cache, dropout=dropout,
        scaling=scaling, options=module.dynamic_mask_options, arguments=arguments,
    )  # fmt: skip
    return output, None


AttentionInterface.register(NAME, attention_interface)
