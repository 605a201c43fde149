"""Language models of transformers with random weights and a tokenizer of bytes, in folders, made offline."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3, "bos_token_id": 256,
    "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip
TEXT = "The clerk wrote it down. Nobody asked again, and the file went back to its shelf.\nThen came winter. " * 60


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and one that begins and ends texts."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<end>", eos_token="<end>")


def tiny_model(family: str = "Llama", **config) -> transformers.PreTrainedModel:
    """An untrained model in eval mode."""
    torch.manual_seed(0)
    make, model = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")
    return model(make(**{**SIZES, **config})).eval()


def save(folder: Path, model: transformers.PreTrainedModel) -> Path:
    """The model and the tokenizer in a folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
