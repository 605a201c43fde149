"""How many keys queries see: the positions whose keys and values reach the output of a head, by gradients."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flexdma.gates import ValueGate
from flexdma.tools.experiments.model import SequenceModel

QUERIES = 32  # of a sequence


def keys_seen(mixer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """[Hq, Q], int64: how many positions each head of the query at each of Q positions sees.

    hidden: [N, width].  The Q = min(N, 32) positions are the last one and others at equal distances before it.
    Queries and gates are constants here: a query's own position is not always one of its keys, and a forget gate adds up
    numbers of all earlier tokens.  A summary counts as the keys that it is made of.
    O(Q N²) time: one call with a copy of the sequence for each query, and a backward per head.
    """
    length = hidden.shape[0]
    queries = torch.arange(length - 1, -1, -max(1, length // QUERIES), device=hidden.device)[:QUERIES]
    copies = hidden.detach().expand(len(queries), -1, -1).clone().requires_grad_()
    joined: list[Tensor] = []
    hooks = [_output_projection(mixer).register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))]
    hooks += [
        module.register_forward_hook(lambda module, inputs, output: tree_map(Tensor.detach, output))
        for name, module in mixer.named_modules()
        if isinstance(module, ValueGate) or name.split(".")[-1] in ("q_proj", "g_proj")
    ]
    try:
        mixer(copies, position_embeddings)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = (
        joined[0][torch.arange(len(queries), device=hidden.device), queries].unflatten(-1, (-1, head_dim)).sum((0, 2))
    )
    gradients = [torch.autograd.grad(head, copies, retain_graph=True)[0] for head in outputs]
    return torch.stack([(gradient != 0).any(-1).sum(-1) for gradient in gradients])


def mean_keys_seen(model: SequenceModel, symbols: Tensor) -> float:
    """The mean of `keys_seen` over layers, heads and queries, for symbols [1, N, S]."""
    given: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    hooks = [mixer.register_forward_pre_hook(lambda module, inputs: given.append(inputs)) for mixer in model.mixers]
    try:
        with torch.no_grad():
            model(symbols)
    finally:
        for hook in hooks:
            hook.remove()
    counts = [
        keys_seen(mixer, hidden[0], tables, model.sizes.head_dim)
        for mixer, (hidden, tables) in zip(model.mixers, given, strict=True)
    ]
    return torch.cat(counts).double().mean().item()


def _output_projection(mixer: nn.Module) -> nn.Module:
    """The projection of the joined heads, by the names that mixers give it.  Raises ValueError where there is none."""
    for name, module in mixer.named_modules():
        if name.split(".")[-1] in ("o_proj", "combine_heads"):
            return module
    raise ValueError(f"mixer: expected one with an output projection, got a {type(mixer).__name__}")
