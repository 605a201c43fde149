"""`save_pretrained` of a converted model writes a folder that transformers loads with its gates.

config.json gets an `auto_map`, and the folder the file `modeling_flexdma.py`, which imports flexdma.  Methods are replaced on
the instance, because a subclass of the model would write its own name into config.json.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from flexdma.atomic_write import atomic_write

SOURCE = Path(__file__).with_name("modeling_flexdma.py")


def save_with_the_gates(model: Any) -> None:
    """Make `save_pretrained` of this model write `auto_map` and modeling_flexdma.py.

    Of a model whose class is not one of transformers' it warns instead, because its own `auto_map` may name other files.
    """
    # While a model is loaded its class is a subclass of the same name.
    is_known = isinstance(model, getattr(transformers, type(model).__name__, ()))
    if not is_known:
        model.save_pretrained = partial(_save_and_warn, model)
        return
    autos = [name for name in modeling_auto.__all__ if name.startswith("Auto")]
    takes = [name for name in autos if getattr(transformers, name)._model_mapping.get(type(model.config), ())]
    before = getattr(model.config, "auto_map", None) or {}
    mine = {name: f"{SOURCE.stem}.{name.replace('Auto', 'Flexdma')}" for name in ("AutoConfig", *takes)}
    model.config.auto_map = {**before, **mine}
    model.save_pretrained = partial(_save, model)
    model._get_files_timestamps = partial(_timestamps_without_source, model)


def _save(model: Any, save_directory: Any, is_main_process: bool = True, *arguments: Any, **named: Any) -> None:
    # Adapters that transformers itself manages are saved alone, without a config.
    if is_main_process and not getattr(model, "_hf_peft_config_loaded", False):
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Before the weights, because push_to_hub uploads at the end of the call.
        atomic_write(folder / SOURCE.name, lambda part: part.write_bytes(SOURCE.read_bytes()))
    type(model).save_pretrained(model, save_directory, is_main_process, *arguments, **named)


def _save_and_warn(model: Any, *arguments: Any, **named: Any) -> None:
    name = type(model).__name__
    type(model).save_pretrained(model, *arguments, **named)
    warnings.warn(
        f"save_pretrained: {name} is no class of transformers, so the saved folder loads without its gates, except by "
        f"flexdma.integrations.transformers.from_pretrained(folder, model_class={name})",
        stacklevel=2,
    )


def _timestamps_without_source(model: Any, working_dir: Any) -> dict[str, float]:
    """As the model's own, which lists the files that push_to_hub need not upload."""
    times = type(model)._get_files_timestamps(model, working_dir)
    return {name: time for name, time in times.items() if name != SOURCE.name}
