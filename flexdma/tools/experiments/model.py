"""The model of all experiments: embeddings, pre-norm blocks of a mixer and an MLP, logits over the symbols."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import pad

from flexdma.tools.byte_models.model import Block, initialise, rotary_embedding
from flexdma.tools.experiments.mixers import ModelSizes, make_mixer


class ShortConvolution(nn.Module):
    """A causal convolution per channel, [B, N, width] -> the same."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel = nn.Conv1d(width, width, size, groups=width)

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

    mixer: one of MIXERS.  symbols: how many different ones.
    convolution: width of a causal convolution before each mixer; 1 = none.
    seed: models of one seed start with the same weights in matrices of the same name and shape.
    """

    def __init__(self, mixer: str, sizes: ModelSizes, symbols: int, *, convolution: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(symbols, sizes.width)
        layers = (make_mixer(mixer, sizes) for _ in range(sizes.layers))
        if convolution > 1:
            layers = (_AfterConvolution(sizes.width, convolution, layer) for layer in layers)
        self.blocks = nn.ModuleList(Block(layer, sizes.width) for layer in layers)
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

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits at every position."""
        hidden = self.embedding(symbols).sum(-2)
        embeddings = rotary_embedding(symbols.shape[1], self.sizes.head_dim, symbols.device)
        for block in self.blocks:
            hidden = block(hidden, embeddings)
        return self.head(self.norm(hidden))
