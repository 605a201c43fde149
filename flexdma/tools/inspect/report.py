"""The report of `inspect_kernels`: the kernels of one call, as text, files, JSON or a comparison."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexdma.tools.inspect.kernel import Kernel

SUFFIX = {"Triton": ".py", "C++": ".cpp"}


@dataclass
class KernelReport:
    """The kernels that Inductor generated for one call, in order of their first launch.

    print(report) shows the attention kernels in full and the others in one line each.
    """

    device: str
    torch: str
    triton: str | None
    kernels: list[Kernel]
    other_calls: dict[str, list[str]]  # phase -> operators that are called without a generated kernel, such as ATen's
    graphs: dict[str, list[str]]  # phase -> the whole generated modules, with kernels and the code that launches them

    @property
    def attention(self) -> list[Kernel]:
        """The FlexAttention kernels."""
        return [kernel for kernel in self.kernels if kernel.is_attention]

    def launches(self, phase: str) -> int:
        """Number of launches of generated kernels in "forward" or "backward"; other calls are not counted."""
        return sum(kernel.launches for kernel in self.kernels if kernel.phase == phase)

    def __str__(self) -> str:
        versions = f"torch {self.torch}" + (f", triton {self.triton}" if self.triton else "")
        lines = [f"{self.device} ({versions})"]
        for phase in ("forward", "backward"):
            kernels = [kernel for kernel in self.kernels if kernel.phase == phase]
            calls = self.other_calls.get(phase, [])
            if not kernels and not calls:
                continue
            lines += ["", f"{phase}: {len(kernels)} kernels, {self.launches(phase)} launches, {len(calls)} other calls"]
            lines += [f"  other calls: {_counted(calls)}"] if calls else []
            lines += [_indented(str(kernel)) for kernel in kernels if kernel.is_attention]
            lines += [
                f"  {kernel.name[:80]}: {kernel.launches} x{_grid(kernel)}"
                + (f", {len(kernel.atomic_lines)} atomics" if kernel.atomic_lines else "")
                for kernel in kernels
                if not kernel.is_attention
            ]
        return "\n".join(lines)

    def save(self, directory: str | Path) -> list[Path]:
        """Write every kernel's source, the generated modules and report.json; return the paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {f"{k.phase}_{k.name}"[:120] + SUFFIX[k.language]: k.source for k in self.kernels}
        for phase, modules in self.graphs.items():
            contents |= {f"{phase}_module_{n}.py": text for n, text in enumerate(modules)}
        contents["report.json"] = self.to_json()
        for name, text in contents.items():
            (folder / name).write_text(text)
        return [folder / name for name in contents]

    def to_json(self) -> str:
        """The report as JSON; `KernelReport.from_json` reads it back."""
        data = vars(self) | {"kernels": [kernel.to_dict() for kernel in self.kernels]}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "KernelReport":
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        data["kernels"] = [Kernel.from_dict(kernel) for kernel in data["kernels"]]
        return cls(**data)

    def diff(self, other: "KernelReport") -> "KernelDiff":
        """The differences from this report to the other."""
        return KernelDiff(self, other)


@dataclass
class KernelDiff:
    """Two reports: print(diff) shows figures that differ, `diff.source()` the changed lines of the sources."""

    before: KernelReport
    after: KernelReport

    def changes(self) -> dict[str, tuple[object, object]]:
        """Figure -> (before, after), for figures that differ."""
        old, new = _figures(self.before), _figures(self.after)
        return {
            name: (old.get(name), new.get(name))
            for name in [*old, *(new.keys() - old)]
            if old.get(name) != new.get(name)
        }

    def source(self) -> str:
        """A unified diff of the attention kernels, without numbers in kernel names."""
        sources = [
            {
                role: re.sub(r"_\d+(?=['(])", "", kernel.source).splitlines()
                for role, kernel in _by_role(report.attention)
            }
            for report in (self.before, self.after)
        ]
        diffs = [
            "\n".join(
                difflib.unified_diff(sources[0].get(role, []), sources[1].get(role, []), role, role, "", "", 2, "")
            )
            for role in sorted(sources[0] | sources[1])
        ]
        return "\n".join(diff for diff in diffs if diff)

    def __str__(self) -> str:
        changes = self.changes()
        if not changes:
            return "no difference in the figures"
        width = max(map(len, changes))
        return "\n".join(f"{name:{width}}  {before} -> {after}" for name, (before, after) in changes.items())


def _figures(report: KernelReport) -> dict[str, object]:
    figures: dict[str, object] = {"device": report.device, "torch": report.torch, "triton": report.triton}
    for phase in ("forward", "backward"):
        figures[f"{phase} launches"] = report.launches(phase)
    for role, kernel in _by_role(report.attention):
        figures |= {f"{role} {name}": value for name, value in kernel.tiles.items()}
        figures |= {f"{role} grid": kernel.grid, f"{role} warps": kernel.warps, f"{role} stages": kernel.stages}
        figures[f"{role} atomic lines"] = len(kernel.atomic_lines)
        if kernel.compiled is not None:
            figures |= {f"{role} {name}": value for name, value in vars(kernel.compiled).items()}
    return figures


def _by_role(kernels: Iterable[Kernel]) -> list[tuple[str, Kernel]]:
    """Kernels with names that match those of another report: the phase, numbered if it has several attention kernels."""
    count: dict[str, int] = {}
    named = []
    for kernel in kernels:
        count[kernel.phase] = count.get(kernel.phase, 0) + 1
        number = count[kernel.phase]
        named.append((kernel.phase if number == 1 else f"{kernel.phase} {number}", kernel))
    return named


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} x{names.count(name)}" if names.count(name) > 1 else name for name in dict.fromkeys(names))


def _grid(kernel: Kernel) -> str:
    return "" if kernel.grid is None else f" grid {'x'.join(map(str, kernel.grid))}"


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
