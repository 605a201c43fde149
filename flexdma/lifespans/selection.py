"""Selection: a policy and its sizes as one value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans.interval import Lifespans
from flexdma.lifespans.ranking import by_rank, death_by_rank
from flexdma.opaque import apart, is_fused, opaque_on_cpu, realize
from flexdma.stages import staged
from flexdma.transforms import can_read

# "global" chooses among later keys too, so a prefix has no state.
STATEFUL_SELECTIONS = ("causal", "threshold", "sliding", "full")


@dataclass(frozen=True)
class Selection:
    """Which keys a query sees, by gates and positions.  `of` checks the arguments of a call and makes one.

    kind: "causal", "global", "threshold" or "sliding", for `causal_top_w`, `global_top_w`, `above_threshold` and
        `sliding_window`; "full" = all keys at or before the query.
    window_size: w, one int per head, or None = no bound.
    sinks, recent: number of first and last keys that are visible and take no places of the window; see `causal_top_w`.
    threshold: for kind "threshold".
    """

    kind: str
    window_size: int | tuple[int, ...] | None
    sinks: int = 0
    recent: int = 0
    threshold: float = 0.0

    @classmethod
    def of(
        cls, kind: str, window_size: int | Sequence[int] | None, sinks: int, recent: int, *, heads: int,
        threshold: float = 0.0, kinds: Sequence[str] = checks.SELECTIONS,
    ) -> "Selection":  # fmt: skip
        """The selection for the arguments of a call with this many gate heads.  Equal arguments give equal selections.

        kinds: the selections that the call takes.
        Raises ValueError or TypeError naming the argument.
        """
        checks.one_of("selection", kind, kinds)
        windows = checks.windows(window_size, heads, needed=kind not in ("threshold", "full"))
        checks.positive_int("sinks", sinks, 0)
        checks.positive_int("recent", recent, 0)
        if kind == "full":
            for name, given, none in (("window_size", window_size, None), ("sinks", sinks, 0), ("recent", recent, 0)):
                if given != none:
                    raise ValueError(
                        f"{name}: expected {none} with selection='full', which sees all keys, got {given!r}"
                    )
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
            raise TypeError(f"threshold: expected a number, got {threshold!r}")
        window = None if not windows else windows[0] if len(windows) == 1 else tuple(windows)
        return cls(kind, window, sinks, recent, threshold)

    @property
    def widest(self) -> int | None:
        """The largest window; None = no bound."""
        return max(self.window_size) if isinstance(self.window_size, tuple) else self.window_size

    @property
    def capacity(self) -> int | None:
        """Upper bound on the keys that one query sees; None = no bound."""
        return None if self.widest is None else self.widest + self.sinks + self.recent

    @property
    def is_bounded(self) -> bool:
        """Whether there is an upper bound on the keys that one query sees."""
        return self.window_size is not None

    @property
    def by_gate(self) -> bool:
        """Whether keys are chosen by their gates."""
        return self.kind in checks.SELECTIONS_BY_GATE

    @property
    def is_ranked(self) -> bool:
        """Whether keys leave because others outrank them, and not by their positions alone."""
        return self.kind != "sliding"

    @property
    def best_stays(self) -> bool:
        """Whether the best-gated key that a query sees stays visible until a better one comes.

        A recent key may be the best, and leave where it does not compete: below a threshold, or outside one choice for all.
        """
        return self.kind == "causal" or (self.is_ranked and not self.recent)

    @property
    def last_positions(self) -> int:
        """How many last positions are visible because they are the last: `recent`, and before them a sliding window."""
        return self.recent + (self.widest or 0) if self.kind == "sliding" else self.recent

    def windows(self, device: torch.device) -> Tensor:
        """The window sizes as [1, 1] or [H, 1] int64; window_size must not be None."""
        assert self.window_size is not None
        return on_device(self.window_size if isinstance(self.window_size, tuple) else [self.window_size], device)

    def gates(self, gate: Tensor | None, key: Tensor) -> Tensor:
        """The gates of keys [B, Hkv, K, D]; for None zeros without memory, [B, 1, K] or where windows differ [B, Hkv, K]."""
        if gate is not None:
            return apart(gate)
        batch, heads, keys, _size = key.shape
        zero = torch.zeros((1, 1, 1), dtype=torch.float32, device=key.device)
        return zero.expand(batch, heads if isinstance(self.window_size, tuple) else 1, keys)

    def refuse_without_state(self, where: str = "with a state") -> None:
        """Raise ValueError unless a prefix has a state.  where: of the call, for the message."""
        if self.kind not in STATEFUL_SELECTIONS:
            raise ValueError(f"selection: expected one of {STATEFUL_SELECTIONS} {where}, got {self.kind!r}")

    def refuse_without_bound(self, where: str) -> None:
        """Raise ValueError unless a prefix has a state, and the number of its keys a bound.  where: as above."""
        self.refuse_without_state(where)
        if not self.is_bounded:
            raise ValueError(f"window_size: expected an int or one per gate head {where}, which it bounds, got None")

    def lifetimes(self, gate: Tensor, is_sink: Tensor) -> Tensor:
        """How many positions keys with these gates [B, H, n] live, [B, H, n] float64; inf = to the end of their documents.

        Only for selections without a bound, where no key competes with another.  is_sink: [B, H, n] bool.
        """
        assert self.capacity is None
        lives_on = is_above(gate.detach(), self.threshold) if self.kind == "threshold" else torch.ones_like(is_sink)
        return torch.full_like(gate, self.recent, dtype=torch.float64).masked_fill(lives_on | is_sink, float("inf"))

    @staged("lifespans")
    def lifespans(
        self, gate: Tensor, *, key_padding_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Lifespans:
        """The lifespans of keys with these gates [B, H, K]; arguments as in `causal_top_w`."""
        checks.selected_keys(gate, key_padding_mask, document_ids)
        gate = gate.detach() if gate.dtype == torch.float64 else gate.detach().float()
        windows = self.window_size if isinstance(self.window_size, tuple) else (self.window_size,)
        birth, death = _lifespans(
            gate, self.kind, [w for w in windows if w is not None], self.threshold, self.sinks, self.recent,
            key_padding_mask, document_ids,
        )  # fmt: skip
        # Buffers, which many kernels read; computed from sorts, not from gates, so that Inductor may fuse across them.
        return Lifespans(*(realize(bound) if is_fused(bound) else bound for bound in (birth, death)))


torch.serialization.add_safe_globals([Selection])


def _empty_lifespans(gate: Tensor, *_others: object) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=torch.int32, device=gate.device) for _ in range(2)]


@opaque_on_cpu("lifespans", _empty_lifespans)
def _lifespans(
    gate: Tensor,
    kind: str,
    windows: list[int],
    threshold: float,
    sinks: int,
    recent: int,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
) -> list[Tensor]:
    length = gate.shape[-1]
    positions = torch.arange(length, device=gate.device)
    if document_ids is not None and _is_one_document(document_ids):
        document_ids = None
    if document_ids is None:
        start, end = positions.new_zeros(1), positions.new_full((1,), length)
    else:
        start, end = document_bounds(document_ids)
    real = gate != float("-inf")
    if key_padding_mask is not None:
        real = real & key_padding_mask[:, None]
    chosen = real & is_above(gate, threshold) if kind == "threshold" else real
    is_sink = None
    if sinks:
        count = real.cumsum(-1)  # 1 at the first real key of the row
        count = count - (count - real.long()).gather(-1, start.expand_as(count))
        is_sink = real & (count <= sinks)
        chosen = chosen & ~is_sink

    if not windows:
        death = end
    elif kind == "sliding":
        death = positions + on_device(windows, gate.device)
    else:
        ranked = by_rank(gate.masked_fill(~chosen, float("-inf")), start if document_ids is not None else None)
        death = death_by_rank(ranked, start, end, on_device(windows, gate.device), shared=kind == "global")
    # Keys compete `recent` positions after they arrive, so each loses its place that much later.
    death = torch.minimum(torch.where(chosen, death, positions) + recent, end)
    if is_sink is not None:
        death = torch.where(is_sink, end, death)
    death = torch.where(real, death, positions)
    return [positions.to(torch.int32).expand(gate.shape), death.to(torch.int32).expand(gate.shape)]


def is_above(gate: Tensor, threshold: float) -> Tensor:
    """Whether gates are above a threshold; NaN is."""
    return ~(gate <= threshold)


def _is_one_document(document_ids: Tensor) -> bool:
    """Whether each row is one document, whose keys need no sorting by document.  Read on a CPU only: no synchronisation.

    A compiled model gets document ids wherever it cannot read whether positions restart.
    """
    readable = document_ids.device.type == "cpu" and can_read(document_ids)
    return readable and torch.equal(document_ids[:, 1:], document_ids[:, :-1])


def on_device(windows: Sequence[int], device: torch.device) -> Tensor:
    """[len(windows), 1] int64, filled on the device, because a tensor made from a list is copied from the host."""
    return torch.cat([torch.full((1, 1), window, device=device, dtype=torch.int64) for window in windows])


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] -> start and end, each [B, 1, K]: the first position of each key's document, and one past its last."""
    length = document_ids.shape[-1]
    positions = torch.arange(length, device=document_ids.device)
    # roll, because torch.export guards sizes of length - 1.
    first = torch.where((document_ids != document_ids.roll(1, -1)) & (positions > 0), positions, 0)
    last = torch.where(document_ids != document_ids.roll(-1, -1), positions + 1, length)
    start = first.cummax(-1).values
    end = last.flip(-1).cummin(-1).values.flip(-1)
    return start[:, None], end[:, None]
