"""A program: `python -m tests.lowerings.recorded_kernels` compiles the attention kernels for GPUs and writes kernels.json.

The figures come from the compiled files; nothing runs.  test_kernels.py compares them exactly, so that a change of
registers, spills or atomics fails until the record is refreshed.
"""

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexdma import dynamic_mask_attention, inspect_kernels
from flexdma.tools.inspect.kernel import Kernel
from tests.comparison import by_atomics

RECORD = Path(__file__).parent / "kernels.json"
# Training in bfloat16, 8 query heads on 2 KV heads, 4096 tokens, w = 512.
SETTINGS: dict[str, dict[str, Any]] = {
    "sm_90, D = 64, float64 gates": {"size": 64, "gate_dtype": torch.float64, "target": "sm_90"},
    "sm_90, D = 128": {"size": 128, "target": "sm_90"},
    "sm_90, D = 128, the gate's gradient by atomics": {"size": 128, "route": "atomics", "target": "sm_90"},
    "gfx942, D = 64": {"size": 64, "target": "gfx942"},
}


def compiled(kernel: Kernel) -> dict[str, Any]:
    """The figures of its compiled file."""
    assert kernel.compiled is not None, kernel.name
    return asdict(kernel.compiled)


def figures(setting: str) -> dict:
    """Phase -> figures of its attention kernel, and the launches of the whole operator."""
    return figures_of(**SETTINGS[setting])


def figures_of(
    *, size: int, target: str, gate_dtype: torch.dtype = torch.float32, route: str = "transposed"
) -> dict[str, dict[str, Any]]:
    """See `figures`."""
    heads = (8, 2, 2)
    query, key, value = (torch.empty(1, n, 4096, size, dtype=torch.bfloat16, requires_grad=True) for n in heads)
    gate = torch.empty(1, 2, 4096, dtype=gate_dtype, requires_grad=True)
    attend = by_atomics if route == "atomics" else dynamic_mask_attention
    report = inspect_kernels(attend, query, key, value, gate, window_size=512, target=target)
    return {
        # The second attention kernel of a backward computes the gate's gradient.
        "backward, gate" if kernel.phase == "backward" and "BLOCK_M" in kernel.tiles else kernel.phase: {
            "launches of the phase": report.launches(kernel.phase),
            "other calls of the phase": len(report.other_calls[kernel.phase]),
            "atomic lines of its other kernels": sum(
                len(other.atomic_lines)
                for other in report.kernels
                if other.phase == kernel.phase and not other.is_attention
            ),
            "tiles": kernel.tiles,
            "warps": kernel.warps,
            "stages": kernel.stages,
            "atomic lines": len(kernel.atomic_lines),
            **compiled(kernel),
        }
        for kernel in report.attention
    }


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    record = {"versions": versions, "settings": {name: figures(name) for name in SETTINGS}}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
