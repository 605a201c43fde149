"""Figures of the grid of tiles, warps and stages: one JSON, filled one compilation at a time, and its table.

{"target": "sm_90", "torch": "2.13.0+cpu", "triton": "3.9.0",
"columns": ["dtype", "head_dim", "phase", "rows", "keys", "warps", "stages", "registers", ...],
"records": [["bfloat16", 64, "forward", 128, 128, 8, 3, 167, 0, 0, 117760, 24, 0.125], ...]}
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from flexdma.tools.inspect.kernel import Compiled, Kernel
from flexdma.tools.inspect.report import KernelReport
from flexdma.tools.tile_grid import Sizes, sizes_of

PHASES = ("forward", "backward")


class Record(NamedTuple):
    """The figures of one kernel of the grid."""

    dtype: str
    head_dim: int
    phase: str
    rows: int
    keys: int
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    tensor_core_instructions: int
    occupancy: float  # 0: needs more shared memory than a block can have

    @property
    def sizes(self) -> Sizes:
        """Its tile, warps and stages."""
        return Sizes(self.rows, self.keys, self.warps, self.stages)


def pairs(dtype: str, head_dim: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Sizes of a forward and of a backward that are compiled together."""
    return zip(*(sizes_of(phase, head_dim, getattr(torch, dtype)) for phase in PHASES), strict=True)


def compiled_pairs(
    dtype: str, head_dim: int, known: Iterable[Record], inspect: Callable[[dict[str, int]], KernelReport]
) -> Iterator[list[Record]]:
    """The records of each pair, without compiling those that are known."""
    have = {(each.phase, each.sizes) for each in known if (each.dtype, each.head_dim) == (dtype, head_dim)}
    for pair in pairs(dtype, head_dim):
        wanted = dict(zip(PHASES, pair, strict=True))
        if have.issuperset(wanted.items()):
            yield []
            continue
        options = {name: size for phase, sizes in wanted.items() for name, size in sizes.options(phase).items()}
        # A second attention kernel of the backward, in the tile of a forward, computes the gate's gradient.
        yield [
            _record(dtype, head_dim, wanted[kernel.phase], kernel)
            for kernel in inspect(options).attention
            if kernel.phase == "forward" or "BLOCK_M" not in kernel.tiles
        ]


def to_json(about: dict[str, Any], records: Iterable[Record]) -> str:
    """The contents of the file, one line per record."""
    head = json.dumps(about | {"columns": Record._fields})[:-1]
    return head + ', "records": [\n ' + ",\n ".join(json.dumps(record) for record in sorted(records)) + "\n]}\n"


def from_json(text: str) -> tuple[dict[str, Any], list[Record]]:
    """The inverse of `to_json`.  Raises ValueError for other texts."""
    about = json.loads(text)
    if not isinstance(about, dict) or about.pop("columns", None) != list(Record._fields):
        raise ValueError(f"columns: expected {list(Record._fields)}")
    return about, [Record(*row) for row in about.pop("records")]


def table(records: Iterable[Record], phase: str) -> str:
    """Markdown: a row per dtype, D and tile, a column per number of warps and stages, in the cells registers and spills."""
    cells: dict[tuple, Record] = {record[:2] + record.sizes: record for record in records if record.phase == phase}
    rows = list(dict.fromkeys(key[:4] for key in sorted(cells, key=lambda key: (key[0], key[1], -key[2], -key[3]))))
    columns = sorted({key[4:] for key in cells}, reverse=True)
    titles = [f"{warps} warps, {stages} stages" for warps, stages in columns]
    lines = [f"| dtype, D | tile | {' | '.join(titles)} |", "|---" * (2 + len(columns)) + "|"]
    for dtype, size, *tile in rows:
        shown = [_cell(cells.get((dtype, size, *tile, *column))) for column in columns]
        lines.append(f"| {dtype}, {size} | {tile[0]} x {tile[1]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.occupancy == 0:
        return "too much shared memory"
    spills = record.spill_stores + record.spill_loads
    return f"{record.registers}, {record.shared_bytes >> 10} KB" + (f", **{spills} spills**" if spills else "")


def _record(dtype: str, head_dim: int, sizes: Sizes, kernel: Kernel) -> Record:
    figures = kernel.compiled
    if not isinstance(figures, Compiled):
        raise ValueError("target: expected an NVIDIA GPU for a grid")
    return Record(
        dtype, head_dim, kernel.phase, *sizes, figures.registers, figures.spill_stores, figures.spill_loads,
        figures.shared_bytes, figures.tensor_core_instructions, figures.occupancy,
    )  # fmt: skip
