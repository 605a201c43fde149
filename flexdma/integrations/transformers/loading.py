"""Load a saved Doge model, or a saved model with gates, ready to use."""

import os
from collections.abc import Callable
from typing import Any

import transformers
from transformers import AutoConfig

from flexdma.integrations.transformers.conversion import attach, convert_to_dma, finish, new_gate
from flexdma.integrations.transformers.doge import use_flexdma
from flexdma.integrations.transformers.layer_selections import layer_selections
from flexdma.integrations.transformers.refusals import refuse_other_attention

# Arguments of transformers' from_pretrained that locate the files, also those of the config.
LOCATION = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")

# Arguments that configs have too, and that transformers' from_pretrained takes beside a config.
OF_WEIGHTS = ("dtype", "torch_dtype", "attn_implementation", "quantization_config", *LOCATION)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    lowering: str | None = None,
    model_class: type | None = None,
    **arguments: Any,
) -> Any:
    """Transformers' from_pretrained for a Doge model, with `use_flexdma`, or for a converted model, with its gates.

    lowering: of the operator.  arguments: of transformers' from_pretrained.
    model_class: None = that of the saved model, which must be one of transformers.
    Returns the model, or (model, info) with output_loading_info=True.
    Raises ValueError where the config is neither Doge's nor that of a converted model, where weights of gates are missing, or
    for an attn_implementation other than "flexdma".
    """
    return load(name_or_path, model_class or saved_class, lowering, arguments)


def load(
    name_or_path: str | os.PathLike[str], kind: type | Callable[[Any], type], lowering: str | None,
    arguments: dict[str, Any],
) -> Any:  # fmt: skip
    """`from_pretrained`.  kind: the class of the model, or a function that finds it for a config."""
    where = {name: arguments[name] for name in LOCATION if name in arguments}
    config = arguments.pop("config", None)
    if config is None or isinstance(config, str | os.PathLike):
        config = AutoConfig.from_pretrained(name_or_path if config is None else config, **where)
        for name in [name for name in arguments if name not in OF_WEIGHTS and hasattr(config, name)]:
            setattr(config, name, arguments.pop(name))
    choice = getattr(config, "flexdma", None)
    if config.model_type != "doge" and choice is None:
        raise ValueError(
            f"config.flexdma: expected what convert_to_dma writes, or a Doge model, got a plain {config.model_type} in "
            f"{str(name_or_path)!r}"
        )
    refuse_other_attention(arguments.get("attn_implementation") or config._attn_implementation)
    plain: Any = kind if isinstance(kind, type) else kind(config)
    if choice is None:
        return use_flexdma(plain.from_pretrained(name_or_path, config=config, **arguments), lowering=lowering)
    return_info = arguments.pop("output_loading_info", False)
    model, info = with_gates(plain, choice, lowering).from_pretrained(
        name_or_path, config=config, output_loading_info=True, **arguments
    )
    missing = sorted(name for name in info["missing_keys"] if "value_gate." in name)
    if missing:
        raise ValueError(
            f"name_or_path: expected the weights of all gates in {str(name_or_path)!r}, got no {missing[0]}"
        )
    # Restore the class, because save_pretrained writes its name.
    model.__class__ = plain
    model.config.architectures = [plain.__name__]
    return (model, info) if return_info else model


def saved_class(config: Any) -> Any:
    """The class of transformers that wrote this config.  Raises ValueError where the config names none."""
    names = [name for name in config.architectures or () if not name.startswith("AutoModel")]
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(
            f"config.architectures: expected the name of a model class of transformers, got {config.architectures}; give "
            "flexdma.integrations.transformers.from_pretrained the model_class"
        )
    return getattr(transformers, names[0])


def class_made(auto: str, config: Any) -> Any:
    """The class that the Auto class of this name makes from a config; None for a config that it does not take."""
    found = getattr(transformers, auto)._model_mapping.get(type(config), None)
    if not isinstance(found, tuple):
        return found
    return next((made for made in found if made.__name__ in (config.architectures or ())), found[0])


def with_gates(plain: type, choice: dict[str, Any], lowering: str | None) -> Any:
    """A subclass whose constructor adds the gates, so that loading finds them.  Gates stay float32."""

    def initialise(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        plain.__init__(self, config, *arguments, **named)  # type: ignore[misc]
        if "value_heads" not in choice:
            convert_to_dma(self, **choice, lowering=lowering)
            return
        modules = dict(self.named_modules())
        heads = {_own_name(self, name, modules): sizes for name, sizes in choice["value_heads"].items()}
        # config.json sorts the names as text; windows per layer are in order of layer_idx.
        names = sorted(heads, key=lambda name: modules[name].layer_idx)
        selections = layer_selections(choice, [heads[name][0] for name in names])
        for name, selection in zip(names, selections, strict=True):
            count, size = heads[name]
            attach(modules[name], new_gate(count, size, choice), selection, lowering)
        finish(self, {**choice, "value_heads": heads})

    float32 = {*(plain._keep_in_fp32_modules_strict or ()), "value_gate"}  # type: ignore[attr-defined]
    # The name and module of the class: transformers uses them to find weights that have other names in files.
    members = {"__init__": initialise, "__module__": plain.__module__, "_keep_in_fp32_modules_strict": float32}
    return type(plain.__name__, (plain,), members)


def _own_name(model: Any, name: str, modules: dict[str, Any]) -> str:
    """The name in this model of a module of the saved one: a base model has no prefix, models with a head have one."""
    prefix = f"{model.base_model_prefix}."
    names = (name, prefix + name, name.removeprefix(prefix))
    found = next((candidate for candidate in names if candidate in modules), None)
    if found is None:
        raise ValueError(f"config.flexdma: expected the attention layers of {type(model).__name__}, got {name}")
    return found
