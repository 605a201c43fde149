"""Compile a Triton kernel to AMD machine code, by Inductor's and Triton's own compiler, and read its figures.

Registers and spills come from the metadata of the assembly, instructions from its text.
"""

import re
from typing import Any

from flexdma.tools.inspect.kernel import CompiledForAMD
from flexdma.tools.inspect.targets import Target, amd_occupancy

MATRIX = re.compile(r"^\s+v_s?mfmac?_", re.MULTILINE)
GLOBAL_REDUCTION = re.compile(r"^\s+(?:global|buffer|flat)_atomic_", re.MULTILINE)


def amd_figures(kernel: Any, target: Target) -> CompiledForAMD:
    """The figures of a kernel that Triton compiled for an AMD target."""
    return figures_of(kernel.asm["amdgcn"], kernel.metadata.shared, kernel.metadata.num_warps, target)


def figures_of(assembly: str, shared_bytes: int, warps: int, target: Target) -> CompiledForAMD:
    """shared_bytes: Triton passes it at launch, so the assembly contains 0."""

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}: +(\d+)", assembly)
        if found is None:
            raise RuntimeError(
                f"target: expected .{name} in the metadata of Triton's assembly for {target.gfx}, found none"
            )
        return int(found[1])

    vector_registers = figure("vgpr_count")
    return CompiledForAMD(
        vector_registers=vector_registers,
        accumulation_registers=figure("agpr_count"),
        scalar_registers=figure("sgpr_count"),
        vector_spills=figure("vgpr_spill_count"),
        scalar_spills=figure("sgpr_spill_count"),
        stack_bytes=figure("private_segment_fixed_size"),
        shared_bytes=shared_bytes,
        matrix_instructions=len(MATRIX.findall(assembly)),
        global_reductions=len(GLOBAL_REDUCTION.findall(assembly)),
        occupancy=amd_occupancy(target, vector_registers, shared_bytes, warps),
    )
