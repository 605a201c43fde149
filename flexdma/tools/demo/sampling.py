"""Text from a trained model, byte by byte, from the bounded state, whose size does not grow with the text."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.tools.byte_models.model import ByteModel


class Sample(NamedTuple):
    """The prompt and its sampled continuation as text, and the bytes of memory."""

    prompt: str
    continuation: str
    state_bytes: int  # states of all layers, at any length
    full_cache_bytes: int  # keys and values of all bytes of both texts


@torch.no_grad()
def sample(model: ByteModel, prompt: Tensor, length: int, *, seed: int, temperature: float = 0.6) -> Sample:
    """Read the prompt [P] in one pass, then sample `length` bytes one at a time, each in O(w)."""
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    states, unread, drawn = model.empty_states(1), prompt.to(device)[None], []
    for _ in range(length):
        logits, states = model.following(unread, states)
        probabilities = torch.softmax(logits[0, -1].float().cpu() / temperature, -1)
        drawn.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        unread = torch.tensor([drawn[-1:]], device=device)
    read = len(prompt) + length
    return Sample(
        _as_text(prompt.tolist()),
        _as_text(drawn),
        sum(state.nbytes for state in states),
        sum(read * (state.key.nbytes + state.value.nbytes) // state.position.shape[-1] for state in states),
    )


def _as_text(values: list[int]) -> str:
    """Text that is safe on a terminal: no invalid UTF-8, and no control characters except line breaks."""
    text = bytes(values).decode("utf-8", errors="replace").expandtabs()
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
