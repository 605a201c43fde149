"""Load a saved Doge model, or a saved model with gates, ready to use."""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from flexdma.integrations.transformers.conversion import attach, convert_to_dma, finish, new_gate
from flexdma.integrations.transformers.doge import use_flexdma
from flexdma.integrations.transformers.layer_selections import layer_selections

# Arguments of transformers' from_pretrained that locate the files, also those of the config.
LOCATION = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")


def from_pretrained(name_or_path: str, *, lowering: str | None = None, **arguments: Any) -> PreTrainedModel:
    """Transformers' from_pretrained for a Doge model, with `use_flexdma`, or for a converted model, with its gates.

    lowering: of the operator.  arguments: of transformers' from_pretrained.  The class of the model is that of the saved one.
    Raises ValueError where the config is neither Doge's nor that of a converted model, or where weights of gates are missing.
    """
    where = {name: arguments[name] for name in LOCATION if name in arguments}
    config = arguments.pop("config", None) or AutoConfig.from_pretrained(name_or_path, **where)
    choice = getattr(config, "flexdma", None)
    if config.model_type != "doge" and choice is None:
        raise ValueError(
            f"config.flexdma: expected what convert_to_dma writes, or a Doge model, got a plain {config.model_type} in "
            f"{str(name_or_path)!r}"
        )
    plain = getattr(transformers, config.architectures[0])
    if choice is None:
        return use_flexdma(plain.from_pretrained(name_or_path, config=config, **arguments), lowering=lowering)
    if "output_loading_info" in arguments:
        raise ValueError("output_loading_info: expected none, as only the model is returned")
    model, info = _with_gates(plain, choice, lowering).from_pretrained(
        name_or_path, config=config, output_loading_info=True, **arguments
    )
    missing = sorted(name for name in info["missing_keys"] if "value_gate." in name)
    if missing:
        raise ValueError(
            f"name_or_path: expected the weights of all gates in {str(name_or_path)!r}, got no {missing[0]}"
        )
    # Restore the class, because save_pretrained writes its name.
    model.__class__ = plain
    return model


def _with_gates(plain: type, choice: dict[str, Any], lowering: str | None) -> Any:
    """A subclass whose constructor adds the gates, so that loading finds them.  Gates stay float32."""

    def initialise(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        plain.__init__(self, config, *arguments, **named)  # type: ignore[misc]
        if "value_heads" not in choice:
            convert_to_dma(self, **choice, lowering=lowering)
            return
        modules = dict(self.named_modules())
        # config.json sorts the names as text; windows per layer are in order of layer_idx.
        sizes = sorted(choice["value_heads"].items(), key=lambda item: modules[item[0]].layer_idx)
        selections = layer_selections(choice, [heads for _, (heads, _) in sizes])
        for (name, (heads, size)), selection in zip(sizes, selections, strict=True):
            attach(modules[name], new_gate(heads, size, choice), selection, lowering)
        finish(self, choice)

    float32 = {*(plain._keep_in_fp32_modules_strict or ()), "value_gate"}  # type: ignore[attr-defined]
    # The name and module of the class: transformers uses them to find weights that have other names in files.
    members = {"__init__": initialise, "__module__": plain.__module__, "_keep_in_fp32_modules_strict": float32}
    return type(plain.__name__, (plain,), members)
