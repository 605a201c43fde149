"""How gates move over training: their parameters, and the keys that they keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexdma import DynamicMaskAttention
from flexdma.gates import ValueGate
from flexdma.tools.experiments.model import SequenceModel
from flexdma.tools.experiments.probes.by_token import parallel_and_by_token
from flexdma.tools.experiments.tasks import Recall


@dataclass(frozen=True)
class GateCourse:
    """On held-out sequences, for each layer and KV head.

    sequences: of the gates.  by_token: sequences that are also answered token by token, after training.
    """

    sequences: int = 64
    by_token: int = 32

    @torch.no_grad()
    def measure(self, model: SequenceModel, task: Recall, *, is_last: bool) -> dict[str, Any]:
        """[layers][heads] numbers.

        A, slope: the parameters; slope only with recency="slope".
        beyond: of the keys that queries see, the share at a distance of w or more, which a window does not have.
        pairs_live, noise_live: the mean number of queries that see a key, of pairs and of noise.
        gap, ranked: of the gate without its recency, the mean of pairs less that of noise, and the share of (pair, noise)
            in which the pair has the larger gate; equal gates count half.

        With is_last also parallel, by_token and same, each a number: see `parallel_and_by_token`.
        """
        symbols = task.held_out(self.sequences).symbols.to(next(model.parameters()).device)
        with _recorded(model) as recorded:
            model(symbols)
        layers = [_layer_numbers(*layer, *task.pairs_and_noise(symbols), model.sizes.window) for layer in recorded]
        found: dict[str, Any] = {name: [layer[name] for layer in layers] for name in (layers[0] if layers else ())}
        if is_last:
            found |= parallel_and_by_token(model, task.held_out(self.by_token))
        return found


def content_gate(gate: ValueGate, value: Tensor) -> Tensor:
    """[B, Hkv, K]: the gates without their recency."""
    found = gate(value) if gate.recency is None else gate(value, return_recency=True)[0]
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[DynamicMaskAttention, Tensor, Tensor]]]:
    """(layer, values, gates) of each layer with a gate that runs inside the context."""
    found: list[tuple[DynamicMaskAttention, Tensor, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, DynamicMaskAttention) and layer.gate is not None]

    def hook_of(layer: DynamicMaskAttention) -> Any:
        return lambda module, inputs, output: found.append((layer, inputs[0].detach(), output.detach()))

    hooks = [layer.gate.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _layer_numbers(
    layer: DynamicMaskAttention, value: Tensor, gates: Tensor, pair: Tensor, noise: Tensor, window: int
) -> dict[str, list[float]]:
    lifespans = layer.policy.lifespans(gates)
    position = torch.arange(gates.shape[-1], device=gates.device)
    end = lifespans.death.clamp(max=gates.shape[-1])
    seen_by = (end - lifespans.birth).clamp(min=0).double()
    beyond = (end - torch.maximum(lifespans.birth, position + window)).clamp(min=0).double()
    content = content_gate(layer.gate, value).double()
    by_head = [(content[:, head][pair], content[:, head][noise]) for head in range(content.shape[1])]
    numbers = {
        "A": layer.gate.A,
        "beyond": beyond.sum((0, 2)) / seen_by.sum((0, 2)),
        "pairs_live": torch.stack([lives[pair].mean() for lives in seen_by.unbind(1)]),
        "noise_live": torch.stack([lives[noise].mean() for lives in seen_by.unbind(1)]),
        "gap": torch.stack([of_pairs.mean() - of_noise.mean() for of_pairs, of_noise in by_head]),
        "ranked": torch.stack([_above(*gates_of_head) for gates_of_head in by_head]),
    }
    if layer.gate.recency == "slope":
        numbers["slope"] = layer.gate.slope
    return {name: tensor.tolist() for name, tensor in numbers.items()}


def _above(first: Tensor, second: Tensor) -> Tensor:
    """The share of (a, b) of two lists with a > b; equal numbers count half."""
    ordered = second.sort().values
    below = torch.searchsorted(ordered, first) + torch.searchsorted(ordered, first, right=True)
    return below.double().mean() / (2 * len(second))
