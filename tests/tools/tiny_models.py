"""Language models of transformers with random weights and a tokenizer of bytes, in folders, made offline."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3, "bos_token_id": 257,
    "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
MERGED = ("þ", "ÿ")  # a GGUF file needs a merge
TEXT = "The clerk wrote it down. Nobody asked again, and the file went back to its shelf.\nThen came winter. " * 60


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, one for two bytes that are not UTF-8, and one that begins and ends texts."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["".join(MERGED)] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, [MERGED]))
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


def write_gguf(path: Path, architecture: str) -> Path:
    """The model of `tiny_model` and its tokenizer as GGUF, under the name of an architecture."""
    import gguf

    model, tokenizer = tiny_model(), byte_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(SIZES["bos_token_id"])
    writer.add_eos_token_id(SIZES["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        kept = weight
        # The rotation of llama.cpp has the two halves of a head interleaved.
        for part, heads in (("q_proj", SIZES["num_attention_heads"]), ("k_proj", SIZES["num_key_value_heads"])):
            if part in name:
                kept = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", kept.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
