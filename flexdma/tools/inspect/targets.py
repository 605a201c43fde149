"""Targets: the GPUs that kernels can be compiled for without having one, and their occupancy.

The figures come from the CUDA programming guide (compute capabilities), NVIDIA's data sheets, and AMD's guide to the CDNA3
instruction set.  Inductor chooses the same tile sizes from them as from the figures of a real device.
"""

from typing import NamedTuple


class Target(NamedTuple):
    """The properties of a device that Inductor and Triton read."""

    name: str
    capability: int  # 90 = compute capability 9.0
    multiprocessors: int
    shared_memory_per_block: int  # bytes, with opt-in
    shared_memory_per_multiprocessor: int
    total_memory: int
    l2_bytes: int
    threads_per_multiprocessor: int = 2048
    blocks_per_multiprocessor: int = 32
    registers_per_multiprocessor: int = 65536
    gfx: str = ""  # AMD's name of the architecture; "" = NVIDIA
    warp_size: int = 32


TARGETS = {
    "sm_80": Target("NVIDIA A100", 80, 108, 166912, 167936, 80 * 2**30, 40 * 2**20),
    "sm_90": Target("NVIDIA H100", 90, 132, 232448, 233472, 80 * 2**30, 50 * 2**20),
    "sm_100": Target("NVIDIA B200", 100, 148, 232448, 233472, 180 * 2**30, 126 * 2**20),
    "gfx942": Target("AMD Instinct MI300X", 94, 304, 65536, 65536, 192 * 2**30, 4 * 2**20, gfx="gfx942", warp_size=64),
}


def known_target(name: str) -> Target:
    """The target of this name.  Raises ValueError listing the known ones otherwise."""
    if name not in TARGETS:
        known = ", ".join(f"{key!r} ({target.name})" for key, target in TARGETS.items())
        raise ValueError(f"target: expected one of {known}, or None for the device of the tensors; got {name!r}")
    return TARGETS[name]


def occupancy(target: Target, registers: int, shared_bytes: int, warps: int) -> float:
    """The share of a multiprocessor's warps that can be resident at once, by the rules of CUDA's occupancy calculator.

    Warps get registers in units of 256, and blocks get shared memory in units of 128 bytes plus 1 KiB for the system.
    """
    registers_per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = target.registers_per_multiprocessor // max(1, registers_per_warp)
    blocks_by_shared = target.shared_memory_per_multiprocessor // (-(-shared_bytes // 128) * 128 + 1024)
    warp_slots = target.threads_per_multiprocessor // 32
    blocks = min(warps_by_registers // warps, blocks_by_shared, warp_slots // warps, target.blocks_per_multiprocessor)
    return blocks * warps / warp_slots


def amd_occupancy(target: Target, vector_registers: int, shared_bytes: int, warps: int) -> float:
    """The share of a compute unit's waves that can be resident at once, as LLVM computes it for CDNA3.

    A compute unit has four SIMDs.  Each holds eight waves at most, and 512 vector registers per lane, accumulation registers
    included, which waves get in units of 8.
    """
    waves_per_simd = min(8, 512 // (-(-max(1, vector_registers) // 8) * 8))
    by_shared = target.shared_memory_per_multiprocessor // shared_bytes if shared_bytes else 32
    return min(4 * waves_per_simd // warps, by_shared) * warps / 32
