"""The model of all experiments: embeddings, pre-norm blocks of a mixer and an MLP, logits over the symbols."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flexdma.tools.byte_models.model import Block, initialise, rotary_embedding
from flexdma.tools.experiments.gate_variants import make_candidate
from flexdma.tools.experiments.mixers import ModelSizes


class ShortConvolution(nn.Module):
    """A causal convolution per channel, [B, N, width] -> the same."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel = nn.Conv1d(width, width, size, groups=width)
        nn.init.zeros_(cast(Tensor, self.kernel.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """Position n reads n - size + 1 .. n."""
        return self.kernel(pad(hidden.mT, (self.size - 1, 0))).mT


class _AfterConvolution(nn.Module):
    """A mixer whose input has passed a convolution."""

    def __init__(self, width: int, size: int, mixer: nn.Module) -> None:
        super().__init__()
        self.convolution, self.mixer = ShortConvolution(width, size), mixer

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        return self.mixer(hidden + self.convolution(hidden), position_embeddings)


class SequenceModel(nn.Module):
    """symbols [B, N, S] int64 -> logits [B, N, symbols].

    mixer: one of CANDIDATES.  symbols: how many different ones.
    convolution: width of a causal convolution before each mixer; 1 = none.
    rotary: whether queries and keys are rotated by their positions.
    seed: decides all weights.  Models of one seed start with the same weights in matrices of the same name and shape.
    """

    def __init__(
        self, mixer: str, sizes: ModelSizes, symbols: int, *, convolution: int = 1, rotary: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.sizes, self.rotary = sizes, rotary
        self.embedding = nn.Embedding(symbols, sizes.width)
        blocks = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for vectors that mixers draw, as biases
            for _ in range(sizes.layers):
                layer = make_candidate(mixer, sizes)
                width = mlp_width(layer, sizes)
                layer = _AfterConvolution(sizes.width, convolution, layer) if convolution > 1 else layer
                blocks.append(Block(layer, sizes.width, width))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, symbols, bias=False)
        initialise(self, seed)

    @property
    def mixers(self) -> list[nn.Module]:
        """The mixer of each layer."""
        layers = [cast(nn.Module, block.attention) for block in self.blocks]
        return [layer.mixer if isinstance(layer, _AfterConvolution) else layer for layer in layers]

    def auxiliary_losses(self) -> list[Tensor]:
        """What mixers add to the loss, of the last call with gradients: their `auxiliary_loss`, where they have one."""
        losses = (getattr(mixer, "auxiliary_loss", None) for mixer in self.mixers)
        return [loss for loss in losses if loss is not None]

    def forward(self, symbols: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits at every position; with at [B, N] bool those where it is True, [their number, symbols]."""
        hidden = self.embedding(symbols).sum(-2)
        embeddings = self._positions(symbols.shape[1], symbols.device)
        for block in self.blocks:
            hidden = block(hidden, embeddings)
        return self.head(self.norm(hidden if at is None else hidden[at]))

    def _positions(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position; without rotation of angle 0, so that all mixers have the same arguments."""
        cos, sin = rotary_embedding(length, self.sizes.head_dim, device)
        return (cos, sin) if self.rotary else (torch.ones_like(cos), torch.zeros_like(sin))


def mlp_width(layer: nn.Module, sizes: ModelSizes) -> int:
    """Hidden numbers of the MLP beside a mixer, so that all blocks have the parameters of full attention beside 4 x width.

    A block differs from that by `width` parameters at most; an MLP has two for each hidden number and channel.
    """
    full = make_candidate("full", sizes)
    more = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in full.parameters())
    return max(1, 4 * sizes.width - round(more / (2 * sizes.width)))
