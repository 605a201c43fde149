"""What a window costs: how much attention outputs change if a head keeps so many keys by gate, for each of some slopes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Looks:
    """Some queries of one sequence, and all of its keys.

    at: [R] int64, the positions of the queries.  query [Hq, R, D], key [Hkv, N, D], value [Hkv, N, Dv].
    scaling: of the logits.  softcap: of the logits, or None.  window: keys that a query of the full model sees at most.
    """

    at: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    window: int

    def to(self, device: torch.device) -> "Looks":
        tensors = {name: getattr(self, name).to(device) for name in ("at", "query", "key", "value")}
        return replace(self, **tensors)

    def weights(self) -> Tensor:
        """[Hkv, R, G, N] float32: probabilities up to a factor per query, of all keys at or before it."""
        groups = self.query.float().unflatten(0, (len(self.key), -1)).transpose(1, 2)
        logits = groups @ self.key.float()[:, None].mT * self.scaling
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits.masked_fill((self.ages() < 0)[:, None], -torch.inf).softmax(-1)

    def ages(self) -> Tensor:
        """[R, N] int64: how much older than the query a key is; below 0 = a later key."""
        return self.at[:, None] - torch.arange(self.key.shape[1], device=self.at.device)


def window_errors(
    looks: Looks, gates: Tensor, slopes: Sequence[float], windows: Sequence[int], *, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """[slopes, windows, Hkv] float64: squared changes of the outputs, summed over queries, the heads of a group, and Dv.

    Also the squares of the full outputs [] float64, summed over all heads beside.
    gates: [Hkv, N].  slopes: added to gates per position.  windows: ascending.
    The kept keys are those of `dynamic_mask_attention`: sinks, recent ones, and of all others the best by gate.

    O(N log N + R N + R G widest window Dv) per KV head and slope.
    """
    weights, ages = looks.weights(), looks.ages()
    # The sums of weights beside those of values.
    values = torch.nn.functional.pad(looks.value.float(), (0, 1), value=1.0)
    full = _mean(weights.masked_fill((ages >= looks.window)[:, None], 0) @ values[:, None])
    forced = (ages < recent) | (torch.arange(ages.shape[1], device=ages.device) < sinks)
    certain = weights.masked_fill(~forced[:, None], 0) @ values[:, None]
    heads = torch.arange(len(values), device=ages.device)[:, None, None]
    bounds = [0, *windows]
    found = []
    for slope in slopes:
        ranked = gates.double() + slope * torch.arange(ages.shape[1], device=ages.device)
        best, exists = _best(ranked, looks.at - recent, sinks, max(windows))
        chosen = weights.gather(-1, best[:, :, None].expand(-1, -1, weights.shape[2], -1)) * exists[:, :, None]
        kept = certain
        for first, end in zip(bounds, windows, strict=False):
            kept = kept + chosen[..., first:end] @ values[heads, best[:, :, first:end]]
            found.append((_mean(kept) - full).square().sum((1, 2, 3)).double())
    return torch.stack(found).unflatten(0, (len(slopes), len(windows))), full.double().square().sum()


def _best(ranked: Tensor, last: Tensor, sinks: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best keys after the sinks up to position `last` [R], in order, [Hkv, R, count] int64, and whether there
    are so many.

    One order of all keys, of which each query takes the first that compete.
    """
    keys = ranked.shape[-1]
    # Of equal gates the newest is first.
    order = keys - 1 - ranked.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    competes = (order[:, None] <= last[:, None]) & (order[:, None] >= sinks)
    seen = competes.cumsum(-1, dtype=torch.int32)
    numbers = torch.arange(1, count + 1, dtype=torch.int32, device=ranked.device)
    places = torch.searchsorted(seen, numbers.expand(*seen.shape[:2], count).contiguous())
    return order[:, None].expand_as(seen).gather(-1, places.clamp(max=keys - 1)), places < keys


def _mean(sums: Tensor) -> Tensor:
    """Weighted means of values from sums of weighted values, the last of which is the sum of weights."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
