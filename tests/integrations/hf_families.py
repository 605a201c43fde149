"""Decoder families of transformers as small random models, and the result of `convert_to_dma` for each.

`python -m tests.integrations.hf_families` rewrites the table in docs/transformers.md.
"""

from pathlib import Path

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.integrations.hf_models import SIZES

from flexdma.integrations.transformers import convert_to_dma  # isort: skip

W = 6
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN, END = "<!-- made by python -m tests.integrations.hf_families -->\n", "<!-- end -->\n"

# Sizes under all the names that families use; names that a family does not have change nothing in it.
SMALL = SIZES | {
    "max_position_embeddings": 64, "n_positions": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
NO_HEAD_DIM = {"head_dim": ...}  # not settable there
SLIDING = {"sliding_window": W, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}
SEQ2SEQ = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "decoder_start_token_id": 1,
}  # fmt: skip
PER_LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# Families for which SMALL is enough.
PLAIN = """
Apertus Arcee AriaText Bert BigBird BioGpt BitNet Bloom Cohere DiffLlama Doge
Ernie4_5 Ernie4_5_Moe FlexOlmo Gemma Glm Glm4 Glm4Moe GPT2 GPTBigCode GPTNeoX GPTNeoXJapanese
Granite GraniteMoe GraniteMoeShared Helium HrmText HunYuanDenseV1 HunYuanMoEV1 HyperCLOVAX HYV3 Jais2
Laguna Llama Llama4Text Mamba Mellum MiMoV2Flash MiniMax MiniMaxM2 Ministral3 Mixtral
ModernBertDecoder Mpt NanoChat Nemotron Olmo Olmo2 OlmoHybrid Olmoe OpenAIGPT Persimmon Phi Phi3 Phimoe Qwen2
Qwen2Moe Qwen3 Qwen3Moe RoFormer Rwkv SeedOss SmolLM3 SolarOpen StableLm Starcoder2
"""
# Family -> options besides SMALL.  A name with a comma is a second setting of the family before the comma.
FAMILIES: dict[str, dict] = {name: {} for name in PLAIN.split()} | {
    "Afmoe": SLIDING,
    "AXK1": LATENT,
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "Bart": SEQ2SEQ,
    "Beam": SLIDING,
    "Bert, is_decoder": {"is_decoder": True},
    "Blenderbot": SEQ2SEQ,
    "CodeGen": {"rotary_dim": 4},
    "Cohere2": SLIDING,
    "Cohere2Moe": SLIDING,
    "CTRL": {"dff": 48},
    "Cwm": SLIDING,
    "Dbrx": {
        "d_model": 32,
        "hidden_size": ...,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "DeepseekV32": LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "Dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "Exaone4": SLIDING,
    "ExaoneMoe": SLIDING,
    "Falcon": NO_HEAD_DIM,
    "Falcon, alibi": NO_HEAD_DIM | {"alibi": True},
    "Falcon, multi_query=False": NO_HEAD_DIM | {"multi_query": False},
    "Falcon, new_decoder_architecture": NO_HEAD_DIM | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64},
    "Flint": SLIDING,
    "Gemma2": SLIDING | {"attn_logit_softcapping": 1.0},
    "Gemma3": {
        "text_config": SMALL,
        "vision_config": SMALL | {"image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
    },
    "Gemma3Text": SLIDING,
    "Gemma3nText": PER_LAYER_INPUT | {"num_kv_shared_layers": 0},
    "Gemma3nText, num_kv_shared_layers": PER_LAYER_INPUT | {"num_kv_shared_layers": 2, "num_hidden_layers": 4},
    "Gemma4Text": PER_LAYER_INPUT,
    "GPTBigCode, multi_query=False": {"multi_query": False},
    "GPTJ": {"rotary_dim": 4},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "Glm4MoeLite": LATENT,
    "GptOss": SLIDING,
    "GraniteMoeHybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "GraniteSWA": SLIDING,
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "JetMoe": {"kv_channels": 8},
    "KimiLinear": LATENT | {"layer_types": ["linear_attention", "full_attention"]},
    "Kolibri1": SLIDING,
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlash": LATENT | {"expert_ffn_hidden_size": 16, "ffn_hidden_size": 48},
    "Mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "Marian": SEQ2SEQ,
    "MBart": SEQ2SEQ,
    "MiniCPM3": LATENT,
    "MiniMaxM3VLText": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "Ministral": SLIDING,
    "Mistral": {"sliding_window": W},
    "Moshi": {"ffn_dim": 48, "audio_vocab_size": 16},
    "NemotronH": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "Olmo3": SLIDING,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Pegasus": SEQ2SEQ,
    "PLBart": SEQ2SEQ,
    "Qwen3Next": LINEAR,
    "Qwen3_5Text": LINEAR,
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "Roberta, is_decoder": {"is_decoder": True},
    "VaultGemma": SLIDING | {"attn_logit_softcapping": 1.0},
    "Whisper": SEQ2SEQ,
    "XGLM": {"ffn_dim": 48, "d_model": 32},
    "Youtu": LATENT,
    "Zamba2": {
        "layer_types": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
}


def exists(family: str) -> bool:
    """Whether the installed transformers has this family."""
    return hasattr(transformers, _config_class(family))


def family_model(family: str) -> transformers.PreTrainedModel:
    """A small random model, eager, in eval mode."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in (SMALL | FAMILIES[family]).items() if value is not ...}
    config = getattr(transformers, _config_class(family))(**sizes)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def _config_class(family: str) -> str:
    return f"{family.split(',')[0]}Config"


def refusal(model: transformers.PreTrainedModel) -> str | None:
    """Convert the model; return the message of a refusal, or None."""
    try:
        convert_to_dma(model, W)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def table() -> str:
    """The table of docs/transformers.md."""
    rows = []
    for family in sorted(filter(exists, FAMILIES), key=str.lower):
        reason = refusal(family_model(family))
        rows.append(f"| {family} | {'works' if reason is None else f'refused: `{reason}`'} |\n")
    version = ".".join(transformers.__version__.split(".")[:2])
    return f"| family in transformers {version} | `convert_to_dma` |\n|---|---|\n" + "".join(rows)


def page_parts() -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, _, rest = DOCS.read_text().partition(BEGIN)
    within, _, after = rest.partition(END)
    return before + BEGIN, within, END + after


if __name__ == "__main__":
    before, _, after = page_parts()
    DOCS.write_text(before + table() + after)
