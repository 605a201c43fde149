"""Small random models of transformers, made offline."""

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from packaging.version import Version

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
# The name of the cache in this transformers, as an argument and in outputs.
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 6},
    "Phi3": {},
    "GPTNeoX": {},
    "Gemma2": {
        "head_dim": 8, "attn_logit_softcapping": 1.0, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GptOss": {
        "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip


def causal_lm(family: str, **config) -> transformers.PreTrainedModel:
    """An untrained model of this family, eager, in eval mode."""
    torch.manual_seed(0)
    make, model = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")
    return model(make(**{**SIZES, **FAMILIES.get(family, {}), **config})).eval()


def doge(**config) -> transformers.PreTrainedModel:
    """A Doge whose gates differ: A is not 0."""
    model = causal_lm("Doge", **{"keep_window_size": 5, **config})
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.A"):
            torch.nn.init.normal_(parameter)
    return model


def gates(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """The parameters of the gates of a converted model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if "value_gate." in name}


def distinct_tokens(batch: int, length: int) -> torch.Tensor:
    """No token twice in a sequence: equal tokens have equal gates, and the top-k of transformers' Doge may choose any."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(60, generator=generator)[:length] + 4 for _ in range(batch)])


def in_a_window(model: transformers.PreTrainedModel, ids: torch.Tensor, window: int) -> torch.Tensor:
    """The logits of an original model with a sliding window: its own eager attention with a mask of queries by keys."""
    position = torch.arange(ids.shape[1])
    age = position[:, None] - position
    mask = torch.where((age >= 0) & (age < window), 0.0, torch.finfo(torch.float32).min).expand(len(ids), 1, -1, -1)
    by_type = {"full_attention": mask, "sliding_attention": mask}
    given = by_type if getattr(model.config, "layer_types", None) else mask
    # OPT would count positions in the mask.
    positions = {"position_ids": position.expand_as(ids)} if model.config.model_type == "opt" else {}
    return model(ids, attention_mask=given, **positions).logits


def padding(side: str, like: torch.Tensor) -> torch.Tensor:
    """An attention mask with 5 padded tokens in the first row, and none in the others."""
    mask = torch.ones_like(like)
    if side != "none":
        mask[0, slice(5) if side == "left" else slice(-5, None)] = 0
    return mask


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Within a few float32 roundings of the largest value, as sums run in another order."""
    error = (got - want).abs().max().item()
    assert error <= tolerance * max(1.0, want.abs().max().item()), error
