"""Gates: one number per key and KV head, computed from the key's value vector.

Dynamic Mask Attention (arXiv 2508.02124, and Hugging Face's Doge):

    gate_j = exp(A * softplus(v_j Delta))     form="exp"
    gate_j =     A * softplus(v_j Delta)      form="linear"

A value carries no position, so such a gate cannot prefer recent keys.  Any number per key may be a gate, and a term that
depends on the query alone cancels in the softmax, hence at no cost

    gate_j + slope_h * j                      recency="slope": DMA with ALiBi (arXiv 2108.12409), slopes learned
    gate_j - sum_{t <= j} logsigmoid(f_t)     recency="forget": DMA with the Forgetting Transformer's gates (2503.02130)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, softplus

from flexdma import checks

FORMS = ("exp", "linear")
RECENCIES = (None, "slope", "forget")
# A forget gate starts at sigmoid(3) = 0.95: a memory of some twenty tokens, to be learned longer or shorter per head.
FORGET_BIAS = 3.0


class ValueGate(nn.Module):
    """values [B, Hkv, K, Dv] -> gates [B, Hkv, K]: float32, or float64 with a recency (its gates grow with position).

    num_kv_heads, head_dim: Hkv and the size of a value head.
    form: "exp" or "linear".  recency: None, "slope" or "forget".
    bias: whether dt_proj has one.
    slopes: with recency="slope" the Hkv initial slopes, in logits per token; default ALiBi's 2 ** (-8 (h + 1) / Hkv).

    Parameters as in Doge checkpoints: A [Hkv], starting at 0 (so DMA starts as a sliding window), and dt_proj, from all
    Hkv * Dv values of a position to Hkv numbers; then `slope` [Hkv], or `forget_proj` like dt_proj.
    Computed in float32 whatever the dtype of values and parameters.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        form: str = "exp",
        recency: str | None = None,
        *,
        bias: bool = False,
        slopes: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("num_kv_heads", num_kv_heads)
        checks.positive_int("head_dim", head_dim)
        checks.one_of("form", form, FORMS)
        checks.one_of("recency", recency, RECENCIES)
        if slopes is not None and recency != "slope":
            raise ValueError(f"slopes: expected None unless recency='slope', got {slopes!r} with recency={recency!r}")
        if slopes is not None and len(slopes) != num_kv_heads:
            raise ValueError(f"slopes: expected {num_kv_heads} numbers, one per KV head, got {len(slopes)}")
        self.num_kv_heads, self.head_dim, self.form, self.recency = num_kv_heads, head_dim, form, recency
        self.A = nn.Parameter(torch.zeros(num_kv_heads))
        self.dt_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=bias)
        if recency == "slope":
            default = [2.0 ** (-8 * (h + 1) / num_kv_heads) for h in range(num_kv_heads)]
            self.slope = nn.Parameter(torch.tensor(default if slopes is None else list(slopes)))
        elif recency == "forget":
            self.forget_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=True)
            nn.init.constant_(self.forget_proj.bias, FORGET_BIAS)

    def extra_repr(self) -> str:
        return (
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, form={self.form!r}, recency={self.recency!r}"
        )

    def forward(self, value: Tensor, *, first_position: int | Tensor = 0, forgotten: Tensor | None = None) -> Tensor:
        """The gates of these values.

        first_position: the position of the first value, one int or [B] integers, where this is not the beginning
            (recency="slope").
        forgotten: [B, Hkv] float64, the sum of -logsigmoid over all earlier positions (recency="forget").
        """
        batch = checks.tensor("value", value, ("B", self.num_kv_heads, "K", self.head_dim)).shape[0]
        if isinstance(first_position, Tensor):
            checks.tensor("first_position", first_position, (batch,), value)
            if first_position.dtype != torch.int64:
                raise TypeError(f"first_position: expected an int or torch.int64 numbers, got {first_position.dtype}")
            first_position = first_position[:, None, None]
        else:
            checks.positive_int("first_position", first_position, 0)
        with torch.autocast(value.device.type, enabled=False):
            gate = self.A.float()[:, None] * softplus(_project(self.dt_proj, value))
            if self.form == "exp":
                gate = gate.exp()
            if self.recency == "slope":
                position = first_position + torch.arange(value.shape[2], device=value.device)
                gate = gate.double() + self.slope.double()[:, None] * position
            elif self.recency == "forget":
                gate = gate.double() + self._forgotten(value, forgotten)
        return gate

    def forgotten_after(self, value: Tensor, forgotten: Tensor | None = None) -> Tensor:
        """[B, Hkv] float64: `forgotten` for the values that follow these, given that for these (recency="forget")."""
        with torch.autocast(value.device.type, enabled=False):
            return self._forgotten(value, forgotten)[..., -1]

    def _forgotten(self, value: Tensor, before: Tensor | None) -> Tensor:
        decay = -logsigmoid(_project(self.forget_proj, value)).double().cumsum(-1)
        if before is None:
            return decay
        checks.tensor("forgotten", before, (value.shape[0], self.num_kv_heads), value)
        if before.dtype != torch.float64:
            raise TypeError(f"forgotten: expected torch.float64, got {before.dtype}")
        return decay + before[..., None]


def _project(projection: nn.Linear, value: Tensor) -> Tensor:
    """[B, Hkv, K, Dv] -> [B, Hkv, K], from all heads of a position, in float32."""
    bias = None if projection.bias is None else projection.bias.float()
    return linear(value.transpose(1, 2).flatten(2).float(), projection.weight.float(), bias).mT
