"""A stand-in for what flexdma uses of torchtitan 0.3, which needs Python 3.11 and a large environment."""

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class Configurable:
    """A class whose `Config` builds it."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None

        def build(self):
            return self._owner(config=replace(self))

        def traverse(self, kind):
            """(name, config, parent, field) of the configs of this kind below this one."""
            for field in fields(self):
                value = getattr(self, field.name)
                for name, each in enumerate(value) if isinstance(value, list) else [("", value)]:
                    path = f"{field.name}.{name}" if isinstance(value, list) else field.name
                    if isinstance(each, kind):
                        yield path, each, self, field.name
                    elif isinstance(each, Configurable.Config):
                        yield from ((f"{path}.{below}", *rest) for below, *rest in each.traverse(kind))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.Config._owner = cls


class Module(nn.Module, Configurable):
    _param_init: dict | None = None
    _sharding_config: Any = None

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        param_init: dict | None = None
        sharding_config: Any = None

        def build(self):
            made = Configurable.Config.build(self)
            made._param_init, made._sharding_config = self.param_init, self.sharding_config
            return made

    def init_states(self):
        for child in self.children():
            if isinstance(child, Module):
                child.init_states()
        if self._param_init is None:
            getattr(self, "reset_parameters", lambda: None)()
            return
        for name, parameter in self.named_parameters(recurse=False):
            self._param_init[name](parameter)

    def parallelize(self, parallel_dims):
        self.parallelized = True


class Linear(nn.Linear, Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        in_features: int
        out_features: int
        bias: bool = False

    def __init__(self, config):
        super().__init__(config.in_features, config.out_features, bias=config.bias)


class VarlenMetadata(NamedTuple):
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


class VarlenAttention(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window_size: tuple[int, int] = (-1, 0)

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None, **kwargs): ...


class BaseAttention(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        n_heads: int
        inner_attention: Module.Config


class GQAttention(BaseAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseAttention.Config):
        dim: int
        n_kv_heads: int | None = None
        head_dim: int | None = None


class ModelConfigConverter(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


@dataclass
class ShardingConfig:
    state_shardings: dict


MODULES: dict[str, dict[str, Any]] = {
    "spmd_types": {"R": "R"},
    "torchtitan": {},
    "torchtitan.distributed": {"ParallelDims": types.SimpleNamespace},
    "torchtitan.models": {},
    "torchtitan.models.common": {},
    "torchtitan.models.common.attention": {
        each.__name__: each for each in (BaseAttention, GQAttention, VarlenAttention, VarlenMetadata)
    },
    "torchtitan.models.common.decoder_sharding": {"dense_param_placement": lambda *, tp: tp},
    "torchtitan.models.common.linear": {"Linear": Linear},
    "torchtitan.protocols": {},
    "torchtitan.protocols.model": {"ModelConfigConverter": ModelConfigConverter},
    "torchtitan.protocols.module": {"Module": Module},
    "torchtitan.protocols.sharding": {"ShardingConfig": ShardingConfig},
}


@contextmanager
def torchtitan_or_stand_in() -> Iterator[None]:
    """torchtitan can be imported: itself where it is installed, else the stand-in, which is removed again at the end."""
    if importlib.util.find_spec("torchtitan") is not None:
        yield
        return
    for name, attributes in MODULES.items():
        made = types.ModuleType(name)
        vars(made).update(attributes)
        sys.modules[name] = made
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("flexdma.integrations.torchtitan")]:
            del sys.modules[name]
        for name in MODULES:
            del sys.modules[name]
