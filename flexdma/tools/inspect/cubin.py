"""Compile a Triton kernel to machine code, by Inductor's and Triton's own compiler, and read its figures.

NVIDIA's here, AMD's in `amdgcn.py`.  Registers and stack come from cuobjdump, instructions from nvdisasm; Triton's package
has both.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from flexdma.tools.inspect.amdgcn import amd_figures
from flexdma.tools.inspect.kernel import Compiled, CompiledForAMD
from flexdma.tools.inspect.targets import Target, occupancy

# Tensor-core instructions of the three generations: sm_80, sm_90, sm_100.
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
SPILL_STORE, SPILL_LOAD = re.compile(r"\bSTL\b"), re.compile(r"\bLDL\b")
GLOBAL_REDUCTION = re.compile(r"\b(?:REDG?|ATOMG?|UREDGR)\b")


def compiled_figures(tuner: Any, target: Target) -> Compiled | CompiledForAMD:
    """Compile Inductor's kernel object in its chosen configuration, and read the machine code."""
    from torch._inductor import config

    configuration = tuner.launchers[0].config if tuner.launchers else tuner.configs[0]
    # The static launcher keeps a file name in place of the machine code.
    with config.patch(use_static_cuda_launcher=False):
        kernel = tuner._precompile_config(configuration).kernel
    if target.gfx:
        return amd_figures(kernel, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK):(\d+)", _output("cuobjdump", "--dump-resource-usage", file.name)))
        code = _output("nvdisasm", "-c", file.name)
    registers = int(usage["REG"])
    return Compiled(
        registers=registers,
        stack_bytes=int(usage["STACK"]),
        spill_stores=len(SPILL_STORE.findall(code)),
        spill_loads=len(SPILL_LOAD.findall(code)),
        shared_bytes=kernel.metadata.shared,
        tensor_core_instructions=len(TENSOR_CORE.findall(code)),
        global_reductions=len(GLOBAL_REDUCTION.findall(code)),
        occupancy=occupancy(target, registers, kernel.metadata.shared, kernel.metadata.num_warps),
    )


def _output(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout
