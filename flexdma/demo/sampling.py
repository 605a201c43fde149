"""Text from a trained model, byte by byte."""

import torch
from torch import Tensor

from flexdma.demo.model import ByteModel


@torch.no_grad()
def sample(model: ByteModel, prompt: Tensor, length: int, *, seed: int, temperature: float = 0.6) -> tuple[str, str]:
    """The prompt [P] and `length` bytes drawn to follow it, both as text.

    Each byte re-evaluates the P bytes before it: the plainest loop that is right, quick enough for a sample, and of one
    shape, so that a device which compiles the attention does so once.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.tolist()
    device = model.embedding.weight.device
    for _ in range(length):
        logits = model(torch.tensor([tokens[-len(prompt) :]], device=device))[0, -1].float().cpu()
        probabilities = torch.softmax(logits / temperature, -1)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return _as_text(tokens[: len(prompt)]), _as_text(tokens[len(prompt) :])


def _as_text(values: list[int]) -> str:
    """What a terminal may safely print: no broken UTF-8, no control characters but line breaks."""
    text = bytes(values).decode("utf-8", errors="replace").expandtabs()
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
