"""Seven families of gates on which packing is measured."""

import torch
from torch import Tensor


def gate_families(length: int, seed: int = 1) -> dict[str, Tensor]:
    """Name -> gates [length] float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(length, generator=generator, dtype=torch.float64)

    position = torch.arange(length, dtype=torch.float64)
    spikes = (torch.rand(length, generator=generator) < 0.01) * -5 * torch.rand(length, generator=generator).log()
    return {
        "iid": normal(),
        "autoregressive": autoregressive(normal(), 0.98),
        "rising": normal() + 6 * position / length,
        "falling": normal() - 3 * position / length,
        "heavy hitters": position / length + spikes,
        "bursts": 0.3 * normal() + 2 * torch.sin(position / 700),
        "quantised": (2 * normal()).round() / 2,
    }


def autoregressive(noise: Tensor, coefficient: float) -> Tensor:
    """x[t] = coefficient * x[t-1] + noise[t], as a convolution with 2048 powers (0.98 ** 2048 is 1e-18)."""
    powers = coefficient ** torch.arange(2048, dtype=torch.float64)
    padded = torch.nn.functional.pad(noise, (len(powers) - 1, 0))
    return torch.nn.functional.conv1d(padded[None, None], powers.flip(0)[None, None])[0, 0]
