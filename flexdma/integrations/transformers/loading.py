"""Load what `save_pretrained` wrote of a Doge model, or of a model with gates, ready to use."""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from flexdma.integrations.transformers.conversion import attach, convert_to_dma, finish, new_gate
from flexdma.integrations.transformers.doge import use_flexdma

# Arguments of transformers' from_pretrained that say where the files are, the config among them.
LOCATION = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")


def from_pretrained(name_or_path: str, *, lowering: str | None = None, **arguments: Any) -> PreTrainedModel:
    """Transformers' from_pretrained, then `use_flexdma` for Doge and `convert_to_dma` as its config says for others.

    lowering: of the operator.  arguments: of transformers' from_pretrained.  The class is the one that was saved.
    Raises ValueError where the config is neither Doge's nor that of a converted model, or weights of gates are missing.
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
    # Its own class again, whose name save_pretrained writes.
    model.__class__ = plain
    return model


def _with_gates(plain: type, choice: dict[str, Any], lowering: str | None) -> Any:
    """The class, with gates before its weights are loaded, which stay float32 as `convert_to_dma` makes them."""

    def initialise(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        plain.__init__(self, config, *arguments, **named)  # type: ignore[misc]
        if "value_heads" not in choice:
            convert_to_dma(self, **choice, lowering=lowering)
            return
        layers = dict(self.named_modules())
        for name, (heads, size) in choice["value_heads"].items():
            attach(layers[name], new_gate(heads, size, choice), choice, lowering)
        finish(self, choice)

    float32 = {*(plain._keep_in_fp32_modules_strict or ()), "value_gate"}  # type: ignore[attr-defined]
    # Its own name and module: by them transformers knows which weights have other names in files.
    members = {"__init__": initialise, "__module__": plain.__module__, "_keep_in_fp32_modules_strict": float32}
    return type(plain.__name__, (plain,), members)
