"""The result of `doctor`: findings, as text or JSON."""

import dataclasses
import json
from dataclasses import dataclass

from flexdma.tools.doctor.environment import Environment

PROBLEM, NOTE = "problem", "note"


@dataclass(frozen=True)
class Finding:
    """One finding.  A problem costs time or correctness; a note does not."""

    level: str  # "problem" or "note"
    kind: str  # "graph break", "recompilation", "recompile limit", "eager FlexAttention", "error", "float64", "environment"
    what: str
    where: str
    do: str

    def __str__(self) -> str:
        return "\n".join([
            f"{self.level}: {self.kind}",
            *(f"  {label:6} {text}" for label, text in
              (("what", self.what), ("where", self.where), ("do", self.do)) if text),
        ])  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """The findings of all calls, problems first."""

    environment: Environment
    backend: str
    calls: int
    graphs: int  # that torch.compile produced, recompilations included
    recompilations: int
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether there is no problem; notes are allowed."""
        return not any(finding.level == PROBLEM for finding in self.findings)

    def of(self, kind: str) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(dataclasses.asdict(self) | {"ok": self.ok}, indent=2)

    def __str__(self) -> str:
        problems = sum(finding.level == PROBLEM for finding in self.findings)
        notes = len(self.findings) - problems
        verdict = "healthy" if self.ok else f"{problems} problem{'s' * (problems != 1)}"
        lines = [
            verdict + (f", {notes} note{'s' * (notes != 1)}" if notes else ""),
            str(self.environment),
            f"{self.calls} calls, {self.graphs} graphs compiled by {self.backend}, {self.recompilations} recompilations",
        ]
        return "\n".join(lines + [f"\n{finding}" for finding in self.findings])
