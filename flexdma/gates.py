"""Gates: one number per key and KV head, computed from the key's value vector.

Dynamic Mask Attention (arXiv 2508.02124, and Hugging Face's Doge):

    gate_j = exp(A * softplus(v_j Delta))     form="exp"         A starts at 0, in all heads
    gate_j =     A * softplus(v_j Delta)      form="linear"      at 0
    gate_j =     A *          v_j Delta       form="identity"    at 1

"exp" is the paper's.  It starts with equal gates, so as a sliding window, and where w keys answer most of what is asked, it
stays one: softplus moves the gates of all keys together, which changes no choice.  "identity", the default, ranks keys from
the first step on (docs/results.md, gates).

A value carries no position, so such a gate cannot prefer recent keys.  A recency term can.  Terms that depend on the query
alone cancel in the softmax, so these two need one number per key:

    gate_j + slope_h * j                      recency="slope": DMA with ALiBi (arXiv 2108.12409), slopes learned
    gate_j - sum_{t <= j} logsigmoid(f_t)     recency="forget": DMA with the Forgetting Transformer's gates (2503.02130)

In a gate such a term ranks keys too, and makes the choice a window where it outgrows A.  `return_recency=True` returns it
apart, so that it can be added to logits alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from flexdma import checks
from flexdma.mixed_precision import is_autocast
from flexdma.opaque import apart
from flexdma.sequences import Sequences, packed_sequences

FORMS = ("exp", "linear", "identity")
INITIAL_A = {"exp": 0.0, "linear": 0.0, "identity": 1.0}
RECENCIES = (None, "slope", "forget")
# A forget gate starts at sigmoid(3) = 0.95, a memory of about twenty tokens; each head learns a longer or shorter one.
FORGET_BIAS = 3.0


class ValueGate(nn.Module):
    """values [B, Hkv, K, Dv] -> gates [B, Hkv, K]: float32, or float64 with a recency, whose gates grow with position.

    num_kv_heads, head_dim: Hkv and the size of a value head.
    form: "identity", "exp" or "linear".  recency: None, "slope" or "forget".
    bias: whether dt_proj has a bias.
    initial_a: A at first, in all heads; default 1 for "identity" and 0 for the others.  With 0 all gates are equal.
    slopes: with recency="slope" the Hkv initial slopes, in logits per token; default ALiBi's 2 ** (-8 (h + 1) / Hkv).

    Parameters as in Doge checkpoints, whose form is "exp": A [Hkv], and dt_proj, from all Hkv * Dv values of a position to
    Hkv numbers; then `slope` [Hkv], or `forget_proj` like dt_proj.
    The projections run in the dtype of A, with or without autocast; later operations run in float32.  bfloat16 projections
    round many gates to the same number, so keep the gate in float32 (`layer.gate.float()`) in a model of lower precision.
    """

    # Whether tensor parallelism has divided the heads: then A and slope are DTensors.  Dynamo sees no attribute of a DTensor.
    is_divided = False
    # Whether the recency ranks keys too, for callers that have no attribute of their own for it.
    recency_ranks = True

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        form: str = "identity",
        recency: str | None = None,
        *,
        bias: bool = False,
        slopes: Sequence[float] | None = None,
        initial_a: float | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("num_kv_heads", num_kv_heads)
        checks.positive_int("head_dim", head_dim)
        checks.one_of("form", form, FORMS)
        checks.one_of("recency", recency, RECENCIES)
        if initial_a is not None and not isinstance(initial_a, int | float):
            raise TypeError(f"initial_a: expected a number or None, got {type(initial_a).__name__}")
        if slopes is not None and recency != "slope":
            raise ValueError(f"slopes: expected None unless recency='slope', got {slopes!r} with recency={recency!r}")
        self.num_kv_heads, self.head_dim, self.form, self.recency = num_kv_heads, head_dim, form, recency
        self.initial_a = INITIAL_A[form] if initial_a is None else initial_a
        self.A = nn.Parameter(torch.empty(num_kv_heads))
        self.dt_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=bias)
        if recency == "slope":
            default = [2.0 ** (-8 * (h + 1) / num_kv_heads) for h in range(num_kv_heads)]
            self.initial_slopes = default if slopes is None else _numbers("slopes", slopes)
            if len(self.initial_slopes) != num_kv_heads:
                raise ValueError(
                    f"slopes: expected {num_kv_heads} numbers, one per KV head, got {len(self.initial_slopes)}"
                )
            self.slope = nn.Parameter(torch.empty(num_kv_heads))
        elif recency == "forget":
            self.forget_proj = _ForgetProjection(num_kv_heads * head_dim, num_kv_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise A and slope; the projections initialise themselves.

        For a gate made on the meta device: after `to_empty`, call it on each module that has a `reset_parameters`, in any
        order.
        """
        nn.init.constant_(self.A, self.initial_a)
        if self.recency == "slope":
            slopes = torch.tensor(self.initial_slopes, device=self.slope.device)
            if hasattr(self.slope, "device_mesh"):  # a DTensor
                slopes = _like(self.slope, slopes)
            with torch.no_grad():
                self.slope.copy_(slopes)

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in ("num_kv_heads", "head_dim", "form", "recency")]
        return ", ".join(shown if self.recency_ranks else [*shown, "recency_ranks=False"])

    def forward(
        self,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        first_position: int | Tensor = 0,
        forgotten: Tensor | None = None,
        return_forgotten: bool = False,
        return_recency: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The gates of these values.

        key_padding_mask: [B, K] bool, True = real token.  A masked token adds no distance to a slope and nothing to the sum
            of forget gates, as position_ids skip it.  Its own gate is that of a value of zeros.
        first_position: number of real tokens before the first value, one int or [B] int64 (recency="slope").
        forgotten: [B, Hkv] float64, the sum of -logsigmoid over all earlier positions (recency="forget").
        return_forgotten: return (gates, `forgotten` for the values that follow); raises unless recency="forget".
        return_recency: return (gates without the recency [B, Hkv, K] float32, the recency [B, Hkv, K] float64) in place of
            the gates, which are their sum; raises without a recency.
        cu_seqlens: [S + 1] int32 or int64, 0 and the ends of S sequences packed into one row (B = 1).  Distances and sums
            begin anew in each, and the returned `forgotten` is [S, Hkv].  Raises with first_position and forgotten.
        """
        if return_forgotten and self.recency != "forget":
            raise ValueError(f"return_forgotten: expected False unless recency='forget', got recency={self.recency!r}")
        if return_recency and self.recency is None:
            raise ValueError("return_recency: expected False with recency=None, which adds nothing, got True")
        value = self._unmasked(value, key_padding_mask)
        sequences = None if cu_seqlens is None else _sequences(cu_seqlens, value, first_position, forgotten)
        if isinstance(first_position, Tensor):
            checks.tensor("first_position", first_position, (value.shape[0],), value)
            if first_position.dtype != torch.int64:
                raise TypeError(f"first_position: expected an int or torch.int64 numbers, got {first_position.dtype}")
        elif type(first_position) is not int or first_position:
            checks.positive_int("first_position", first_position, 0)
        if is_autocast(value.device.type):
            with torch.autocast(value.device.type, enabled=False):
                gate, recency = self._terms(value, key_padding_mask, first_position, forgotten, sequences)
        else:
            gate, recency = self._terms(value, key_padding_mask, first_position, forgotten, sequences)
        if recency is None:
            return gate
        gates = (gate, recency.expand_as(gate)) if return_recency else (gate + recency,)
        if not return_forgotten:
            return gates if return_recency else gates[0]
        if sequences is not None:
            return *gates, _at_ends(recency, sequences)
        # A copy: a view would keep all sums in memory, and torch.compile would guard its strides.
        return *gates, recency[..., -1].clone(memory_format=torch.contiguous_format)

    def _terms(
        self, value: Tensor, mask: Tensor | None, first_position: int | Tensor, forgotten: Tensor | None,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What depends on values alone, [B, Hkv, K] float32, and the recency, [1 or B, Hkv, K] float64 or None."""
        scale = self._of_heads("A")
        scale = scale if scale.dtype == torch.float32 else scale.float()
        projected = self._project(self.dt_proj, value)
        gate = scale.unsqueeze(-1) * (projected if self.form == "identity" else softplus(projected))
        if self.form == "exp":
            gate = gate.exp()
        if self.recency is None:
            return gate, None
        if self.recency == "forget":
            return gate, self._forgotten(value, mask, forgotten, sequences)
        slope = self._of_heads("slope").double()
        # Decoding.  A length is compared only after another position than 0, because torch.export would guard it.
        if (
            type(first_position) is int
            and first_position
            and value.shape[2] == 1
            and mask is None
            and sequences is None
        ):
            return gate, (slope * first_position)[None, :, None]
        before = first_position.unsqueeze(-1) if isinstance(first_position, Tensor) else first_position
        position = before + _real_tokens_before(value, mask)
        if sequences is not None:
            position = position - position[:, sequences.start]
        return gate, slope.unsqueeze(-1) * position.unsqueeze(1)

    def _of_heads(self, name: str) -> Tensor:
        """Parameter `name` [Hkv]; under tensor parallelism the numbers of this rank's heads."""
        parameter = getattr(self, name)
        if not self.is_divided:
            return parameter
        own: Tensor = parameter.to_local()
        if own.shape[0] != self.num_kv_heads:
            raise RuntimeError(
                f"{name}: expected {self.num_kv_heads} numbers, one per KV head, got a shard of {own.shape[0]}; call the "
                f"module that fully_shard was applied to"
            )
        return own

    def _unmasked(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """The values with zeros for masked tokens, so that their contents reach neither gates nor gradients."""
        batch, _, keys, _ = checks.tensor("value", value, ("B", self.num_kv_heads, "K", self.head_dim)).shape
        if mask is None:
            return value
        checks.padding_mask(mask, batch, keys, value)
        return value.masked_fill(~mask[:, None, :, None], 0.0)

    def _forgotten(
        self, value: Tensor, mask: Tensor | None, before: Tensor | None, sequences: Sequences | None
    ) -> Tensor:
        decay = -logsigmoid(self._project(self.forget_proj, value)).double()
        if mask is not None:
            decay = decay.masked_fill(~mask[:, None], 0.0)
        decay = apart(decay)
        if sequences is not None:
            total = decay.cumsum(-1)
            return total - (total - decay)[..., sequences.start]
        total = apart(decay.cumsum(-1))
        if before is None:
            return total
        checks.tensor("forgotten", before, (value.shape[0], self.num_kv_heads), value)
        if before.dtype != torch.float64:
            raise TypeError(f"forgotten: expected torch.float64, got {before.dtype}")
        return total + before[..., None]

    def _project(self, projection: nn.Module, value: Tensor) -> Tensor:
        """[B, Hkv, K, Dv] -> [B, Hkv, K] float32, from all heads of a position.

        Calls the module and never reads its weight, because hooks, adapters and sharded, offloaded or quantised weights act
        in the call.
        """
        joined, dtype = value.transpose(1, 2).flatten(2), self.A.dtype
        projected = projection(joined if joined.dtype == dtype else joined.to(dtype))
        # Contiguous: for a view aten::softplus_backward returns other strides than torch.compile expects (torch 2.13).
        return projected.float().mT.contiguous()


class _ForgetProjection(nn.Linear):
    """A projection whose bias starts at FORGET_BIAS."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, FORGET_BIAS)


def _numbers(name: str, given: Any) -> list[float]:
    """The elements as a list.  Raises TypeError naming the argument where they are no numbers."""
    try:
        return [float(each) for each in given]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a sequence of numbers, got {given!r}") from None


def _like(sharded: Any, whole: Tensor) -> Tensor:
    """A tensor that every rank has, as a DTensor with the shards of another."""
    from torch.distributed.tensor import distribute_tensor  # costs an import, so only where there is a DTensor

    return distribute_tensor(whole.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _real_tokens_before(value: Tensor, mask: Tensor | None) -> Tensor:
    """[1 or B, K] int64: the number of real tokens before each token."""
    if mask is None:
        return torch.arange(value.shape[2], device=value.device)[None]
    return mask.cumsum(-1) - mask.long()


def _sequences(cu_seqlens: Tensor, value: Tensor, first_position: object, forgotten: object) -> Sequences:
    """The sequences of values [1, Hkv, T, Dv].  Raises where an argument belongs to earlier tokens of one sequence."""
    if value.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected all sequences in one row, got {value.shape[0]} rows")
    if isinstance(first_position, Tensor) or first_position != 0:
        raise ValueError("first_position: expected 0 with cu_seqlens, as each sequence begins in this row, got another")
    if forgotten is not None:
        raise ValueError("forgotten: expected None with cu_seqlens, as each sequence begins in this row, got a tensor")
    return packed_sequences(cu_seqlens, value.shape[2], value)


def _at_ends(total: Tensor, sequences: Sequences) -> Tensor:
    """[1, Hkv, T] sums within sequences -> [S, Hkv], those at the last token of each; 0 for an empty sequence."""
    last = total[0][:, (sequences.cu_seqlens[1:] - 1).clamp(min=0)]
    return last.masked_fill(sequences.cu_seqlens.diff() == 0, 0.0).T.contiguous()
