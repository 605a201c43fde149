"""One generated kernel: its source, and properties read from the source.

Line numbers count from 1 in `source`, which is Inductor's text, unchanged.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Names of tile sizes in Inductor's attention templates and its other kernels.
TILE_NAMES = re.compile(r"(BLOCK_[MN][12]?|SPARSE_(?:Q|KV)_BLOCK_SIZE|[XYZ]BLOCK|R\d*_BLOCK)")
CONSTANT = re.compile(r"^\s+(\w+) *: *tl\.constexpr = (\d+)\s*$", re.MULTILINE)
CPP_TILE = re.compile(r"int64_t (qBlockSize|kvBlockSize) = (\d+);")


@dataclass
class Compiled:
    """Figures of the machine code, read from the compiled file without running it."""

    registers: int  # per thread
    stack_bytes: int  # per thread; spilled registers are stored here
    spill_stores: int  # instructions that write to the stack
    spill_loads: int  # instructions that read it
    shared_bytes: int  # per block
    tensor_core_instructions: int
    global_reductions: int  # atomic instructions on global memory
    occupancy: float  # resident warps over the maximum of a multiprocessor

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.spill_stores} spill stores, {self.spill_loads} spill loads, "
            f"{self.shared_bytes} B shared, {self.tensor_core_instructions} tensor-core instructions, "
            f"{self.global_reductions} atomic instructions, occupancy {self.occupancy:.0%}"
        )


@dataclass
class CompiledForAMD:
    """Figures of AMD machine code, read from its assembly without running it."""

    vector_registers: int  # per lane, with those for accumulation
    accumulation_registers: int  # of these, only for matrix instructions
    scalar_registers: int  # per wave
    vector_spills: int  # vector registers kept in memory
    scalar_spills: int  # scalar registers kept in lanes of vector registers, or in memory
    stack_bytes: int  # per lane
    shared_bytes: int  # per block (LDS)
    matrix_instructions: int
    global_reductions: int  # atomic instructions on global memory
    occupancy: float  # resident waves over the maximum of a compute unit

    def __str__(self) -> str:
        return (
            f"{self.vector_registers} vector registers ({self.accumulation_registers} for accumulation), "
            f"{self.scalar_registers} scalar registers, {self.vector_spills} vector spills, {self.scalar_spills} scalar "
            f"spills, {self.stack_bytes} B stack, {self.shared_bytes} B LDS, {self.matrix_instructions} matrix "
            f"instructions, {self.global_reductions} atomic instructions, occupancy {self.occupancy:.0%}"
        )


@dataclass
class Kernel:
    """A generated kernel, and its figures if it was compiled."""

    name: str
    phase: str  # "forward" or "backward"
    language: str  # "Triton" or "C++"
    source: str
    launches: int = 0
    grid: tuple[int, ...] | None = None  # of the first launch
    warps: int | None = None
    stages: int | None = None
    block_sizes: dict[str, int] = field(default_factory=dict)  # chosen at launch
    compiled: Compiled | CompiledForAMD | None = None

    @property
    def is_attention(self) -> bool:
        """Whether this is a FlexAttention kernel, and not a kernel that prepares its inputs."""
        return "SPARSE_KV_BLOCK_SIZE" in self.source or "kvBlockSize" in self.source

    @property
    def tiles(self) -> dict[str, int]:
        """Tile sizes by their names in the source."""
        written = CPP_TILE if self.language == "C++" else CONSTANT
        found = {name: int(value) for name, value in written.findall(self.source)}
        if self.language == "Triton":
            found = {name: value for name, value in found.items() if TILE_NAMES.fullmatch(name)}
        return found | self.block_sizes

    @property
    def gate_lines(self) -> list[int]:
        """Lines where an attention kernel loads tensors that its score_mod captures: in flexdma gate and reference."""
        return _section_loads(self.source, self.language) if self.is_attention else []

    @property
    def mask_lines(self) -> list[int]:
        """Lines where an attention kernel sets the scores outside the mask to -inf, and their gradients to 0."""
        marks = ("tl.where(mask_mod_output",) if self.language == "Triton" else ("// Apply block mask",)
        return self._lines_with(*marks) if self.is_attention else []

    @property
    def atomic_lines(self) -> list[int]:
        """Lines with atomic additions, which cost time and give sums that differ from run to run."""
        return self._lines_with("tl.atomic_add(", "atomic_add(")

    def _lines_with(self, *marks: str) -> list[int]:
        return [n for n, line in enumerate(self.source.splitlines(), 1) if any(mark in line for mark in marks)]

    def __str__(self) -> str:
        launches = f"{self.launches} launch{'' if self.launches == 1 else 'es'}"
        grid = "" if self.grid is None else f" of grid {'x'.join(map(str, self.grid))}"
        lines = [f"{self.name}", f"  {self.phase}, {self.language}, {launches}{grid}"]
        if self.warps is not None:
            lines[1] += f", {self.warps} warps, {self.stages} stages"
        if self.tiles:
            lines.append("  tiles: " + ", ".join(f"{name} {value}" for name, value in self.tiles.items()))
        for label, where in (
            ("gate loaded", self.gate_lines), ("mask applied", self.mask_lines), ("atomics", self.atomic_lines)
        ):  # fmt: skip
            if where:
                lines.append(f"  {label}: line{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}")
        if self.compiled is not None:
            lines.append(f"  compiled: {self.compiled}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the properties of the source as plain data, for JSON."""
        derived = ("is_attention", "tiles", "gate_lines", "mask_lines", "atomic_lines")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Kernel":
        """The inverse of `to_dict`."""
        values = {entry.name: data[entry.name] for entry in fields(cls)}
        values["grid"] = None if values["grid"] is None else tuple(values["grid"])
        if (figures := values["compiled"]) is not None:
            values["compiled"] = (CompiledForAMD if "vector_registers" in figures else Compiled)(**figures)
        return cls(**values)


def _section_loads(source: str, language: str) -> list[int]:
    """Lines that load a captured tensor between the start of the score_mod and its result."""
    triton = language == "Triton"
    start, end = (
        ("Apply score modification", "post_mod_scores =") if triton else ("// apply score mod", "// Apply block mask")
    )
    load = re.compile(r"tl\.load\((in_ptr|arg_)" if triton else r"= in_ptr\d+\[")
    inside, found = False, []
    for number, line in enumerate(source.splitlines(), 1):
        inside = (inside or start in line) and end not in line
        # The C++ kernel reads indices with the same syntax as captured tensors, but at 0 or at the loop variable.
        if inside and load.search(line) and (triton or "tmp" in line.split("in_ptr")[1]):
            found.append(number)
    return found
