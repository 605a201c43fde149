"""A program: `python -m tests.tools.fitted_bytes` fits cost_model/kernel_bytes.py to bytes counted by the compiler.

It writes the counts to counted_bytes.json and prints the tables, which takes minutes.  test_cost.py compares the tables with
these counts, and the formulas with new counts at other sizes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from flexdma import causal_top_w, cost
from flexdma.packing import BlockIndex, Packing, block_index, pack, packed_layout
from flexdma.packing.rows import FoldedRows
from flexdma.tools.cost_model.kernel_bytes import BYTES, PEAKS
from flexdma.tools.timing import peak_bytes

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "tools" / "counted_bytes.json"
LENGTH = 32768
ONE, TWO = [1, 4, 1], [1, 8, 2]  # batch, query heads, KV heads
# Several periods and one, few tiles and many, 6 to 10 rounds of ranking by two bits and 21 by one; one KV head, several, all.
CASES: list[dict[str, Any]] = [
    *({"shape": [*ONE, n, 64], "window": 512} for n in (4096, 16384)),
    *({"shape": [*ONE, 16384, 64], "window": w} for w in (4096, 8192)),
    *({"shape": [*ONE, n, 64], "window": 1024} for n in (65536, 2**20, 2**21)),
    *({"shape": [*TWO, 16384, 64], "window": w, "backward": True} for w in (512, 4096, 8192)),
    {"shape": [2, 4, 4, 12288, 32], "window": 6000, "backward": True},
    *({"shape": [2, 8, 2, 1, d], "window": 512, "decode": True} for d in (64, 128)),
]


def counted_bytes(cases: list[dict]) -> list[list[int]]:
    """The bytes of each case by graph, counted by tests/tools/counted_bytes.py in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.counted_bytes"], input="\n".join(map(json.dumps, cases)), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return list(map(json.loads, done.stdout.splitlines()))


def expected_bytes(shape: list[int], window: int, backward: bool = False, decode: bool = False) -> list[sympy.Expr]:
    """The cost model's bytes of a case, by graph."""
    batch, query_heads, heads, length, size = shape
    calls = [cost.decode()] if decode else [cost.forward(training=backward), *([cost.backward()] if backward else [])]
    sizes = {"B": batch, "Hq": query_heads, "Hkv": heads, "N": length, "w": window, "D": size, "Dv": size, "rows": 128,
             "columns": 128, "element": 2, "slots": window}  # fmt: skip
    numbers = {symbol: sympy.Integer(sizes[symbol.name]) for symbol in cost.symbols.SYMBOLS if symbol.name in sizes}
    return [call.bytes.xreplace(numbers) for call in calls]


def fitted(counts: list[list[int]]) -> dict[str, int]:
    """The table with the least squares of relative errors over the counts of CASES."""
    unknown = {name: sympy.Symbol(f"x{number}") for number, name in enumerate(BYTES)}
    with patch.dict(BYTES, unknown):
        sums = [total for case in CASES for total in expected_bytes(**case)]
    # The model is linear in the table: columns @ table - others = 0 means sums = 0.
    columns, others = (
        torch.tensor(matrix.tolist(), dtype=torch.float64)
        for matrix in sympy.linear_eq_to_matrix(sums, list(unknown.values()))
    )
    counted = torch.tensor([[total] for graphs in counts for total in graphs], dtype=torch.float64)
    table = torch.linalg.lstsq(columns / counted, (counted + others) / counted).solution
    return {name: round(value) for name, value in zip(BYTES, table.flatten().tolist(), strict=True)}


def packing_peak(window: int, training: bool) -> tuple[int, int, int]:
    """Places, tiles, and the peak bytes of packing LENGTH keys and making the lists, with groups of 4."""
    alive = causal_top_w(torch.randn(1, 1, LENGTH), window)
    layout = packed_layout(LENGTH, LENGTH, window, block_size=(128, 128), group=4)

    def build() -> tuple[Packing, BlockIndex]:
        packing = pack(alive, layout, queries=LENGTH)
        return packing, block_index(
            packing.birth, packing.death, rows=FoldedRows(LENGTH, 4), block_size=(128, 128), transposed=training,
            periods=layout.periods, period=layout.period,
        )  # fmt: skip

    packing, index = build()
    return packing.order.numel(), index.partial_indices.numel(), peak_bytes(build)


def fitted_peaks() -> dict[str, int]:
    """PEAKS, from narrow windows, where packing has the peak, and wide ones, where the lists have it."""
    places, _, narrow = packing_peak(64, False)
    found = {"packing, place": narrow / places}
    for phase in ("inference", "training"):
        (_, few, less), (_, many, more) = (packing_peak(window, phase == "training") for window in (4096, 8192))
        found[f"{phase} lists, tile"] = (more - less) / (many - few)
    found["lists, place"] = (more - found["training lists, tile"] * many) / places
    return {name: round(found[name]) for name in PEAKS}


if __name__ == "__main__":
    counts = counted_bytes(CASES)
    RECORD.write_text(json.dumps({"torch": torch.__version__, "counts": counts}) + "\n")
    for table in (fitted(counts), fitted_peaks()):
        print("\n".join(f'    "{name}": {value},' for name, value in table.items()), end="\n\n")
