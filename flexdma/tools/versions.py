"""The versions that flexdma supports: the bounds of pyproject.toml, read from the installed package."""

import importlib.metadata
import re
from typing import NamedTuple

from torch.torch_version import TorchVersion


class Bounds(NamedTuple):
    """The supported versions: from `oldest` up to, but not including, `first_untested`."""

    oldest: str
    first_untested: str

    def __str__(self) -> str:
        return f">={self.oldest},<{self.first_untested}"

    def is_older(self, version: str) -> bool:
        return TorchVersion(version) < self.oldest

    def is_newer(self, version: str) -> bool:
        return TorchVersion(version) >= self.first_untested


def bounds(package: str) -> Bounds | None:
    """The bounds of a dependency; None where flexdma is imported from a folder and not installed."""
    try:
        requirements = importlib.metadata.requires("flexdma") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        found = dict(re.findall(r"(>=|<)([\d.]+)", requirement.split(";")[0]))
        if re.match(rf"{package}\b", requirement) and len(found) == 2:
            return Bounds(found[">="], found["<"])
    raise LookupError(f"package: expected one that the installed flexdma requires within bounds, got {package!r}")
