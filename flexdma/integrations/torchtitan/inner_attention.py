"""Dynamic Mask Attention (arXiv 2508.02124) as the inner attention of torchtitan's `GQAttention`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata
from torchtitan.protocols.module import Module

from flexdma import checks
from flexdma.attention import dynamic_mask_attention
from flexdma.attention_layer import called_gate
from flexdma.integrations.torchtitan.gate import Gate
from flexdma.lifespans import Selection
from flexdma.varlen import dynamic_mask_attention_varlen


class DynamicMaskInnerAttention(Module):
    """query, key, value -> output, in torchtitan's layouts: [B, L, N, H] (0.3), or [T, N, H] (its main branch).

    `gate`, a `ValueGate`, is a submodule and reads the value heads, so it is trained, sharded and saved with the model.
    It reads all KV heads: tensor and context parallel are refused.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """window_size: w, keys that a query sees.  Other options: as of `flexdma.DynamicMaskAttention`.

        n_kv_heads, head_dim: of the attention around it; `DynamicMaskConverter` sets them.
        A `VarlenAttention.Config`, so that torchtitan's models make the boundaries of documents for it, and refuse
        context parallel.
        """

        window_size: int | Sequence[int] | None
        n_kv_heads: int | None = None
        head_dim: int | None = None
        form: str = "identity"
        recency: str | None = None
        slopes: Sequence[float] | None = None
        recency_ranks: bool = True
        selection: str = "causal"
        sinks: int = 0
        recent: int = 0
        lowering: str | None = None
        block_size: int | tuple[int, int] | None = None
        kernel_options: Mapping[str, object] | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        heads, size = config.n_kv_heads, config.head_dim
        if heads is None or size is None:
            raise ValueError(
                f"n_kv_heads, head_dim: expected those of the attention, got {heads} and {size}; "
                "DynamicMaskConverter sets them"
            )
        if config.param_init is not None:
            raise ValueError("param_init: expected None, because the gate initialises itself, got a mapping")
        checks.one_of("lowering", config.lowering, (None, *checks.LOWERINGS))
        self.gate = Gate(heads, size, config.form, config.recency, slopes=config.slopes)
        checks.recency_ranks(config.recency_ranks, config.recency)
        self.recency_ranks = config.recency_ranks
        self.options: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("selection", "sinks", "recent", "lowering", "block_size", "kernel_options")
        }
        self.window_size = config.window_size

    @property
    def window_size(self) -> int | Sequence[int] | None:
        """The window w, which may be set between calls, as that of `flexdma.DynamicMaskAttention`."""
        window: int | Sequence[int] | None = self.options["window_size"]
        return window

    @window_size.setter
    def window_size(self, window_size: int | Sequence[int] | None) -> None:
        kind, sinks, recent = (self.options[name] for name in ("selection", "sinks", "recent"))
        heads, kinds = self.gate.num_kv_heads, checks.SELECTIONS_BY_GATE
        Selection.of(kind, window_size, sinks, recent, heads=heads, kinds=kinds)  # raises for what is wrong
        self.options["window_size"] = window_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attention_masks: VarlenMetadata | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: None = None,
    ) -> Tensor:
        """The attention's output, in the layout of `query`.

        query: [B, L, N, H] or [T, N, H]; key, value: the same with n_kv_heads heads.
        attention_masks: the boundaries of documents, over all B * L or T tokens; None = one document per row.
        scale: default 1 / sqrt(H).  enable_gqa: not needed, as the tensors have their numbers of heads.
        Raises TypeError for another kind of mask, ValueError for documents of queries that are not those of keys,
        NotImplementedError for out_transform, which needs the log-sum-exp.
        """
        if out_transform is not None:
            raise NotImplementedError(
                "out_transform: expected None, because no log-sum-exp is returned, got a function"
            )
        if query.dim() not in (3, 4):
            raise ValueError(f"query: expected [B, L, N, H] or [T, N, H], got {list(query.shape)}")
        if attention_masks is None:
            output = self._rows(query, key, value, scale)
        elif isinstance(attention_masks, VarlenMetadata):
            output = self._documents(query, key, value, scale, attention_masks)
        else:
            raise TypeError(
                f"attention_masks: expected VarlenMetadata or None, got {type(attention_masks).__name__}; "
                "build the model with attn_backend='varlen'"
            )
        return output.view(*query.shape[:-1], value.shape[-1])

    def _rows(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[B, L, N, H], or [T, N, H] as one row; a document per row."""
        if query.dim() == 3:
            query, key, value = query[None], key[None], value[None]
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        gate, bias = self._gates(value)
        output: Tensor = dynamic_mask_attention(query, key, value, gate, bias=bias, scale=scale, **self.options)
        return output.transpose(1, 2).contiguous()

    def _documents(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, documents: VarlenMetadata
    ) -> Tensor:
        """All tokens in one row, [T, N, H], which `documents` divides."""
        ends = documents.cu_seq_q
        if documents.cu_seq_k.shape != ends.shape:
            raise ValueError(
                f"attention_masks: expected the same documents in cu_seq_q and cu_seq_k, got {len(ends) - 1} and "
                f"{len(documents.cu_seq_k) - 1}"
            )
        query, key, value = (each.reshape(-1, *each.shape[-2:]) for each in (query, key, value))
        gate, bias = (
            None if numbers is None else numbers[0].transpose(0, 1)
            for numbers in self._gates(value.transpose(0, 1)[None], cu_seqlens=ends)
        )  # fmt: skip
        output: Tensor = dynamic_mask_attention_varlen(
            query, key, value, gate, ends, bias=bias, scale=scale, **self.options
        )
        return output

    def _gates(self, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The gates of values [B, N, K, H], and the recency where it does not rank."""
        gate, bias, _ = called_gate(self.gate, value, ranks=self.recency_ranks, **options)
        return gate, bias

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Shard as torchtitan does.

        Raises NotImplementedError for tensor and context parallel, and for the backend full_dtensor, in which inputs are
        plain tensors here and the gate's parameters are not.
        """
        for name, degree in (("tensor", parallel_dims.tp), ("context", parallel_dims.cp)):
            if degree > 1:
                raise NotImplementedError(
                    f"{name}_parallel_degree: expected 1, because the gate reads all value heads of a sequence, got {degree}"
                )
        if parallel_dims.spmd_backend == "full_dtensor":
            raise NotImplementedError("spmd_backend: expected 'spmd_types' or 'partial_dtensor', got 'full_dtensor'")
        super().parallelize(parallel_dims)

    # torchtitan shards inputs by the names that its inner attentions give them, which differ between its versions.
    forward.__signature__ = inspect.signature(VarlenAttention.forward)  # type: ignore[attr-defined]
