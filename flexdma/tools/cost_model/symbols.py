"""The symbols of the formulas."""

import sympy

(B, Hq, Hkv, N, w, D, Dv, rows, columns, ranks, slots, element, gate_element) = SYMBOLS = sympy.symbols(
    "B Hq Hkv N w D Dv rows columns ranks slots element gate_element", positive=True, integer=True
)
# Visited pairs over shown pairs, of packed keys: 1.1 to 1.3, depending on the gates (docs/benchmarks.md).
rho = sympy.Symbol("rho", positive=True)

MEANING = {
    "B": "batch",
    "Hq": "query heads",
    "Hkv": "KV heads",
    "N": "tokens",
    "w": "keys that a query sees",
    "D": "size of a query and key head",
    "Dv": "size of a value head",
    "rows": "rows of a mask block; a query position has Hq / Hkv of them",
    "columns": "keys of a mask block",
    "ranks": "devices that share a sequence",
    "slots": "keys of a decoding state: w + sinks + recent",
    "element": "bytes per number of query, key, value and output",
    "gate_element": "bytes per gate",
    "rho": "pairs in the visited blocks over pairs that the mask shows",
}
