"""The query heads of a group as the rows of one head, which then share one mask and one visit of each key block."""

from typing import NamedTuple

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


class FoldedRows(NamedTuple):
    """The rows of a KV head: `group` query heads of `queries` positions each.

    by_head: row g * queries + i is query i of the group's head g, which is a view of contiguous heads.  A mask block of
        `rows` rows must not span two heads, so `queries` is a multiple of it.  Each head repeats the same blocks.
    otherwise: row i * group + g.  A mask block spans rows / group positions.
    """

    queries: int
    group: int
    by_head: bool = False

    @classmethod
    def of(cls, queries: int, group: int, block_rows: int, device_type: str) -> "FoldedRows":
        """By head where blocks allow it.

        Not on a CPU, whose kernel gains more from blocks of few positions, and not for a symbolic length, which a score_mod
        would capture as a number.
        """
        allowed = group > 1 and device_type != "cpu" and has_static_value(queries)
        return cls(queries, group, allowed and queries % block_rows == 0)

    @property
    def per_position(self) -> int:
        """Consecutive rows of one position."""
        return 1 if self.by_head else self.group

    @property
    def repeats(self) -> int:
        """How many runs of rows see the same blocks."""
        return self.group if self.by_head else 1

    @property
    def total(self) -> int:
        """The number of rows."""
        return self.queries * self.group

    def position(self, row: Tensor) -> Tensor:
        """The query of a row, from 0 to queries - 1."""
        return _remainder(row, self.queries) if self.by_head else _quotient(row, self.group)

    def head(self, row: Tensor) -> Tensor:
        """The row's head within its group."""
        return _quotient(row, self.queries) if self.by_head else _remainder(row, self.group)

    def of_rows(self, numbers: Tensor) -> Tensor:
        """[B, Hkv, Q], one number of each query -> [B, Hkv, rows]."""
        return numbers.repeat(1, 1, self.group) if self.by_head else numbers.repeat_interleave(self.group, -1)

    def folded(self, query: Tensor, heads: int) -> Tensor:
        """[B, Hq, Q, D] -> [B, Hkv, rows, D]."""
        grouped = query.unflatten(1, (heads, self.group))  # [B, Hkv, G, Q, D]
        if not self.by_head:
            grouped = grouped.transpose(2, 3)
        batch, size = query.shape[0], query.shape[-1]
        return grouped.reshape(batch, heads, self.total, size)

    def unfolded(self, tensor: Tensor) -> Tensor:
        """[B, Hkv, rows, ...] -> [B, Hkv, Q, G, ...]."""
        if self.by_head:
            return tensor.unflatten(2, (self.group, self.queries)).transpose(2, 3)
        return tensor.unflatten(2, (self.queries, self.group))


# Kernels compute these two for every pair of a tile whose columns are rows.  Rows are not negative, and Python's remainder
# would correct the sign.
def _quotient(row: Tensor, divisor: int) -> Tensor:
    if _is_power_of_two(divisor):
        return row >> (divisor.bit_length() - 1)
    return row // divisor


def _remainder(row: Tensor, divisor: int) -> Tensor:
    return row & (divisor - 1) if _is_power_of_two(divisor) else row.fmod(divisor)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
