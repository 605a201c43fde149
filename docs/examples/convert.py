"""Give a decoder of transformers the gates of Dynamic Mask Attention, train them, and generate with a bounded cache.

    python docs/examples/convert.py

A small random Llama stands for a model from the hub: AutoModelForCausalLM.from_pretrained(...) goes in its place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexdma.integrations.transformers import convert_to_dma


def main(steps: int = 5) -> int:
    """Train the gates alone on random tokens, generate, and return the bytes that the cache keeps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = convert_to_dma(LlamaForCausalLM(config), window_size=16, sinks=2, recency="slope")
    gates = [parameter for name, parameter in model.named_parameters() if "value_gate" in name]
    optimizer = torch.optim.AdamW(gates, lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(3, 128, (4, 64))
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    prompt = torch.randint(3, 128, (1, 64))
    generated = model.eval().generate(prompt, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    cache = generated.past_key_values
    print(f"{cache.get_seq_length()} tokens seen, {cache.nbytes:,} bytes kept")
    return cache.nbytes


if __name__ == "__main__":
    main()
