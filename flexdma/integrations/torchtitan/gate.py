"""A `ValueGate` of torchtitan's modules: they initialise their own parameters and state how these are sharded."""

import math
from collections.abc import Sequence
from functools import partial

import spmd_types as spmd
from torch import nn
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from flexdma.gates import FORGET_BIAS, ValueGate


class Gate(ValueGate, Module):
    """`ValueGate` whose modules are torchtitan's; parameters, their names and their initial values are the same.

    Every rank has the whole gate, or its shard by FSDP.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        form: str = "identity",
        recency: str | None = None,
        *,
        slopes: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_kv_heads, head_dim, form, recency, slopes=slopes)
        self._sharding_config = _replicated(*(name for name, _ in self.named_parameters(recurse=False)))
        self.dt_proj = _linear(self.dt_proj)
        if recency == "forget":
            self.forget_proj = _linear(self.forget_proj, initial_bias=FORGET_BIAS)


def _linear(linear: nn.Linear, initial_bias: float = 0.0) -> Linear:
    """A module of torchtitan's in place of `linear`, with the initial weights of `nn.Linear` and this initial bias."""
    weight = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
    made = Linear.Config(
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        param_init={"weight": weight, "bias": partial(nn.init.constant_, val=initial_bias)},
        sharding_config=_replicated("weight", "bias"),
    ).build()
    # Its weights now, as every nn.Module has them; torchtitan calls this again after `to_empty`.
    made.init_states()
    return made


def _replicated(*names: str) -> ShardingConfig:
    return ShardingConfig(state_shardings={name: dense_param_placement(tp=spmd.R) for name in names})
