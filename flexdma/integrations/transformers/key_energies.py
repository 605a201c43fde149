"""What a gate reads besides values: the energies of keys, which rotary embeddings do not change.

A rotary embedding (arXiv 2104.09864) turns each pair (k_d, k_{d + D/2}) of a key by an angle that grows with its position.
The length of the pair stays, so log(k_d^2 + k_{d + D/2}^2) depends on the key and not on its position.  With other pairings,
or without rotation, these are other features of the key, and the fit weighs them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexdma.integrations.transformers.float32_gate import Float32Gate

# Added to an energy before its logarithm.
ENERGY_FLOOR = 1e-6


class KeyValueGate(Float32Gate):
    """A gate whose input is `with_key_energies`; `head_dim` is Dv + D // 2."""

    reads_keys = True


class _OfKeys:
    """A `KeyValueGate` as a function of values, for these keys."""

    def __init__(self, gate: Any, key: Tensor) -> None:
        self.gate, self.key = gate, key

    @property
    def recency(self) -> str | None:
        return self.gate.recency

    @property
    def recency_ranks(self) -> bool:
        return self.gate.recency_ranks

    def __call__(self, value: Tensor, **options: Any) -> Any:
        return self.gate(with_key_energies(self.key[:, :, : value.shape[2]], value), **options)


def gate_of(gate: Any, key: Tensor) -> Callable[..., Any]:
    """The gate as a function of values whose first ones belong to these keys [B, Hkv, K, D]."""
    # Not isinstance, because adapters wrap gates.
    return _OfKeys(gate, key) if getattr(gate, "reads_keys", False) else gate


def with_key_energies(key: Tensor, value: Tensor) -> Tensor:
    """[B, Hkv, K, Dv + D // 2] float32: values and the logarithms of the energies of keys' pairs.

    key: [B, Hkv, K, D], positions encoded; value: [B, Hkv, K, Dv].
    """
    half = key.shape[-1] // 2
    first, second = key[..., :half].float(), key[..., half : 2 * half].float()
    return torch.cat([value.float(), (first.square() + second.square() + ENERGY_FLOOR).log()], -1)


def gate_input_size(key: Tensor, value: Tensor, reads_keys: bool) -> int:
    """Numbers per head that a gate reads of these keys and values."""
    return value.shape[3] + (key.shape[3] // 2 if reads_keys else 0)
