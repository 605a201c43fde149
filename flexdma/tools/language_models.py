"""Language models of transformers by the name that a user gives: a hub name, a folder, or a GGUF file.

What cannot be loaded is refused in one line.
"""

import importlib.metadata
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from flexdma.tools.refusal import RefusedError, check_installed
from flexdma.tools.versions import bounds

EXTRA = "evaluate"
# Classes of errors that transformers raises for models, files and names that it cannot load.
UNLOADABLE = (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, AttributeError, struct.error)


class LanguageModel(NamedTuple):
    """A causal language model in eval mode, its tokenizer, and the name by which the user gave it."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def choice(self) -> dict[str, Any] | None:
        """`config.flexdma` of a converted model; None for others."""
        return getattr(self.model.config, "flexdma", None)


def load_language_model(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model and tokenizer of a hub name, a folder (plain, or saved by flexdma with its gates) or a .gguf file.

    A model from a GGUF file has its weights in `dtype` and an ordinary config, so it can be saved.
    Raises RefusedError naming what is missing or cannot be read.
    """
    check_installed("transformers", extra=EXTRA)
    path = Path(name)
    is_file = path.is_file()
    if is_file and path.suffix != ".gguf":
        raise RefusedError(f"MODEL: expected a hub name, a model folder or a .gguf file, got the file {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise RefusedError(f"MODEL: expected a model folder, got {name}, which has no config.json")
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix == ".gguf"):
        raise RefusedError(
            f"MODEL: expected a hub name, a model folder or a .gguf file, got {name}, which does not exist"
        )
    if is_file:
        check_installed("gguf", extra=EXTRA)
    with without_bars():
        try:
            model, tokenizer = _gguf(path, dtype) if is_file else _folder_or_hub(name, dtype)
        except UNLOADABLE as error:
            raise RefusedError(f"MODEL: cannot load {name}: {_first_line(error)}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise RefusedError(
            f"MODEL: expected a tokenizer of at most {rows:,} ids, as {name} has embeddings, got {tokenizer.vocab_size:,}"
        )
    return LanguageModel(model.to(device).eval(), tokenizer, name)


def full_attention(model: Any) -> Any:
    """A model with the weights of a converted one, in the same memory, without its gates; a plain model as it is."""
    if getattr(model.config, "flexdma", None) is None:
        return model
    config = type(model.config)(**{name: value for name, value in model.config.to_dict().items() if name != "flexdma"})
    plain = _empty(type(model), config, model.device)
    weights = {name: weight for name, weight in model.state_dict(keep_vars=True).items() if "value_gate." not in name}
    plain.load_state_dict(weights, assign=True)
    return plain.eval()


def cache_argument() -> str:
    """The name of a model's cache argument in the installed transformers."""
    import transformers

    return "cache" if TorchVersion(transformers.__version__) >= "5.24" else "past_key_values"


def why_not_converted() -> str | None:
    """Why the installed transformers runs no converted models; None where it does."""
    version, supported = importlib.metadata.version("transformers"), bounds("transformers")
    if supported is None or not supported.is_older(version):
        return None
    return f"flexdma converts models of transformers {supported}, got {version}"


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars and reports of transformers, as the command has its own."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _folder_or_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if getattr(AutoConfig.from_pretrained(name), "flexdma", None) is None:
        return _complete(*AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)), tokenizer
    reason = why_not_converted()
    if reason is not None:
        raise ImportError(reason)
    from flexdma.integrations.transformers import from_pretrained

    return _complete(*from_pretrained(name, dtype=dtype, output_loading_info=True)), tokenizer


def _gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The weights are moved to an ordinary model, because transformers refuses to save one of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path.resolve().parent, "gguf_file": path.name}
    where["config"] = AutoConfig.from_pretrained(**where)  # each reads the whole file for it otherwise
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = _complete(*AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, output_loading_info=True))
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    plain = _empty(type(read), type(read.config)(**config), read.device)
    plain.load_state_dict(read.state_dict(keep_vars=True), assign=True)
    plain.generation_config = read.generation_config
    return plain, tokenizer


def _complete(model: Any, info: Mapping[str, Any]) -> Any:
    """The model.  Raises ValueError where weights are missing, which transformers draws at random."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"it has no {missing[0]}" + (f" and {len(missing) - 1} more weights" if missing[1:] else ""))
    return model


def _empty(kind: type, config: Any, device: torch.device) -> Any:
    """A model whose parameters are about to be replaced, so they are not initialised.  Its buffers are."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        return kind(config)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:300] if lines else type(error).__name__}"
