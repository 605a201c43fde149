"""The classes that `auto_map` of a saved folder names, so that transformers' Auto classes load the folder with its gates.

They only stand in: configs and models that they return have the classes of transformers, so that everything that looks
classes up (conversions of weights, pipelines, adapters) finds them.
"""

from copy import deepcopy
from functools import cache, partial
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from flexdma.integrations.transformers.loading import class_made, load, saved_class, with_gates
from flexdma.integrations.transformers.refusals import refuse_other_attention

# Name of an Auto class -> name of the class that stands in for its configs or models.
STAND_INS = {
    name: name.replace("Auto", "Flexdma") for name in ("AutoConfig", *modeling_auto.__all__) if name.startswith("Auto")
}


@cache
def stand_in(name: str) -> type:
    """The class of this name among STAND_INS.  Raises AttributeError where there is none."""
    autos = [auto for auto, mine in STAND_INS.items() if mine == name]
    if not autos:
        raise AttributeError(f"flexdma: expected one of {', '.join(STAND_INS.values())}, got {name}")
    return _Config if autos == ["AutoConfig"] else type(name, (_Model,), {"auto": autos[0]})


class _Config:
    """In place of a config's class, for `AutoConfig.from_pretrained(..., trust_remote_code=True)`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing, because no config has this class."""

    @classmethod
    def from_pretrained(cls, folder: str, /, **arguments: Any) -> Any:
        """As AutoConfig.from_pretrained, with the Auto class of the model first among the architectures.

        `transformers serve` and TRL load a model by the first one.  Only an Auto class reads `auto_map`.
        """
        loaded = AutoConfig.from_pretrained(folder, **{**arguments, "trust_remote_code": False})
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        saved = saved_class(config)
        auto = next(
            (auto for auto in config.auto_map if auto != "AutoConfig" and class_made(auto, config) is saved), None
        )
        config.architectures = [*([auto] if auto else ()), *config.architectures]
        return loaded


class _Model:
    """In place of a model's class, for an Auto class's `from_pretrained(..., trust_remote_code=True)`.

    auto: the name of the Auto class.
    """

    auto: str

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing, because no model has this class."""

    @classmethod
    def from_pretrained(cls, folder: str, /, **arguments: Any) -> Any:
        """As `flexdma.integrations.transformers.from_pretrained`, as the class that the Auto class makes."""
        return load(folder, partial(class_made, cls.auto), None, arguments)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **named: Any) -> PreTrainedModel:
        """An untrained model with gates, for `AutoModelForCausalLM.from_config(config, trust_remote_code=True)`."""
        refuse_other_attention(named.get("attn_implementation"))
        plain = class_made(cls.auto, config)
        model = with_gates(plain, config.flexdma, None)._from_config(deepcopy(config), **named)
        model.__class__ = plain
        model.config.architectures = [plain.__name__]
        return model
