"""The folder of a small converted model, as `save_pretrained` writes it, with a tokenizer of characters."""

from pathlib import Path

import torch

from tests.integrations.hf_models import causal_lm

import tokenizers  # isort: skip  # after hf_models, which keeps transformers offline
import transformers  # isort: skip
from flexdma.integrations.transformers import convert_to_dma  # isort: skip

CHARACTERS = [chr(code) for code in range(32, 127)]
WINDOWS = (8, (4, 12))


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character, none for anything else."""
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<bos>", "<eos>", *CHARACTERS])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.decoder = tokenizers.decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def converted(family: str = "Llama", **config) -> transformers.PreTrainedModel:
    """A model whose gates differ, with the tokenizer's vocabulary, which never ends a text by itself."""
    model = causal_lm(family, vocab_size=len(CHARACTERS) + 3, eos_token_id=None, **config)
    model = convert_to_dma(model, WINDOWS, recency="slope", sinks=2, recent=[0, 3])
    for name, parameter in model.named_parameters():
        if name.endswith("value_gate.A"):
            torch.nn.init.normal_(parameter)
    return model


def folder(path: Path, model: transformers.PreTrainedModel | None = None) -> Path:
    """A folder with this model, or `converted`, and the tokenizer."""
    (converted() if model is None else model).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
