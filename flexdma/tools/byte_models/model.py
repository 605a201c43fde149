"""A byte-level language model: embedding, two pre-norm blocks of attention and MLP, logits over the 256 bytes."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from flexdma import DynamicMaskAttention, Lifespans, State
from flexdma.tools.byte_models.attentions import lifespans_of, make_attention

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the language model, the same for all kinds of attention."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    window: int = 64
    # One head starts with a short range and one with a long range: a logit falls by one in 3 and in 33 tokens.
    slopes: tuple[float, ...] = (0.3, 0.03)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    mlp_width: hidden numbers of the MLP; default 4 x width.
    """

    def __init__(self, attention: nn.Module, width: int, mlp_width: int | None = None) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), attention
        self.mlp_norm = nn.RMSNorm(width)
        hidden = 4 * width if mlp_width is None else mlp_width
        self.mlp = nn.Sequential(nn.Linear(width, hidden, False), nn.GELU(), nn.Linear(hidden, width, False))

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, width] -> the same."""
        hidden = hidden + self.attention(self.attention_norm(hidden), position_embeddings)
        return hidden + self.mlp(self.mlp_norm(hidden))

    def following(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], state: State
    ) -> tuple[Tensor, State]:
        """`forward` of the n tokens [B, n, width] after the attention's state, and the state after them."""
        normed = self.attention_norm(hidden)
        attended, state = self.attention(normed, position_embeddings, state=state, return_state=True)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), state


def run_block(block: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Call the block; as a function, so that one compilation is for all layers."""
    return block(hidden, position_embeddings)


RunBlock = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]


class ByteModel(nn.Module):
    """bytes [B, N] int64 -> logits [B, N, 256] of the next byte.

    seed: models of the same seed start with the same weights in matrices of the same name and shape.
    """

    def __init__(self, kind: str, sizes: ModelSizes, *, recency: str, seed: int) -> None:
        super().__init__()
        self.kind, self.sizes, self.recency = kind, sizes, recency
        self.embedding = nn.Embedding(256, sizes.width)
        self.blocks = nn.ModuleList(
            Block(
                make_attention(
                    kind,
                    sizes.width,
                    sizes.heads,
                    sizes.kv_heads,
                    sizes.window,
                    recency=recency,
                    slopes=list(sizes.slopes),
                ),
                sizes.width,
            )
            for _ in range(sizes.layers)
        )
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256, bias=False)
        initialise(self, seed)

    def attentions(self) -> list[DynamicMaskAttention]:
        """The attention of each layer."""
        return [module for module in self.modules() if isinstance(module, DynamicMaskAttention)]

    def forward(self, tokens: Tensor, run_block: RunBlock = run_block, *, first: int = 0) -> Tensor:
        """Logits of the next byte at each position.  run_block: may be compiled.  first: the position of the first byte."""
        hidden = self.embedding(tokens)
        embeddings = rotary_embedding(tokens.shape[1], self.sizes.width // self.sizes.heads, tokens.device, first=first)
        for block in self.blocks:
            hidden = run_block(block, hidden, embeddings)
        return self.head(self.norm(hidden))

    def empty_states(self, batch_size: int) -> list[State]:
        """The state of each layer before the first byte; only kinds of dynamic mask attention have them."""
        return [attention.empty_state(batch_size) for attention in self.attentions()]

    def following(self, tokens: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Logits [B, n, 256] of the n bytes [B, n] after the states, and the states after them."""
        hidden = self.embedding(tokens)
        head_dim = self.sizes.width // self.sizes.heads
        embeddings = rotary_embedding(tokens.shape[1], head_dim, tokens.device, first=states[0].length)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            hidden, state = cast(Block, block).following(hidden, embeddings, state)
            after.append(state)
        return self.head(self.norm(hidden)), after


def rotary_embedding(
    length: int, head_dim: int, device: torch.device, *, first: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (arXiv 2104.09864), each [length, head_dim].

    first: the first position; or [B], that of each sequence, and then each is [B, length, head_dim].
    """
    exponent = torch.arange(0, head_dim, 2, device=device) / head_dim
    position = torch.arange(length, device=device)
    position = (first[:, None] if isinstance(first, Tensor) else first) + position
    angle = position[..., None] * ROTARY_BASE**-exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


@contextmanager
def recorded_gates(model: ByteModel) -> Iterator[list[Tensor]]:
    """A list that gets the gates [B, Hkv, N] of each layer when the (uncompiled) model runs inside the context."""
    gates: list[Tensor] = []
    hooks = [
        attention.gate.register_forward_hook(lambda module, inputs, output: gates.append(output.detach()))
        for attention in model.attentions()
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layer_gates(model: ByteModel, tokens: Tensor) -> list[tuple[Tensor, Lifespans]]:
    """Gates and lifespans [B, Hkv, N] of each layer for tokens [B, N]; N may exceed the training context."""
    with recorded_gates(model) as gates:
        model(tokens)
    return [(gate, lifespans_of(model.kind, gate, model.sizes.window)) for gate in gates]


def initialise(model: nn.Module, seed: int) -> None:
    """Draw each matrix from its own generator, seeded by its name, so that an extra module changes no other matrix."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        with torch.no_grad():
            if name == "embedding.weight":
                parameter.normal_(generator=generator)
            else:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
