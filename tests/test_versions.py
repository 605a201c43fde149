"""The supported versions are stated in pyproject.toml; what repeats them elsewhere says the same."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from flexdma.tools.bench import peers
from flexdma.tools.inspect.device_guard import TESTED
from flexdma.tools.versions import bounds

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
REQUIREMENTS = [Requirement(found) for found in re.findall(r'"((?:torch|transformers|triton)[<>=][^"]*)"', PROJECT)]
PYTHONS = SpecifierSet(re.findall(r'^requires-python = "(.*)"', PROJECT, re.MULTILINE)[0])
# Pages that tell users what is supported; others name versions in which something was seen.
PROSE = ("README.md", "docs/design.md", "docs/doctor.md", "docs/transformers.md",
         "flexdma/integrations/transformers/__init__.py")  # fmt: skip
JOBS = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"][
    "include"
]


def stated(package: str) -> SpecifierSet:
    """The bounds of pyproject.toml, the same wherever it names the package."""
    (specifier,) = {requirement.specifier for requirement in REQUIREMENTS if requirement.name == package}
    return specifier


def ends(specifier: SpecifierSet) -> tuple[Version, Version]:
    """(oldest, first untested)."""
    ((oldest,), (untested,)) = ([Version(s.version) for s in specifier if s.operator == kind] for kind in (">=", "<"))
    return oldest, untested


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_installed_package_has_the_stated_bounds(package):
    assert SpecifierSet(str(bounds(package))) == stated(package)


def test_a_package_without_bounds_is_refused():
    with pytest.raises(LookupError, match="got 'triton'"):
        bounds("triton")


@pytest.mark.parametrize("page", PROSE)
def test_prose_states_the_same_bounds(page):
    text = (ROOT / page).read_text()
    ranges = re.findall(r"\b(torch|transformers)(?: outside)?,? (\d+\.\d+) to (\d+\.\d+)", text)
    assert ranges
    for package, first, last in ranges:
        oldest, untested = ends(stated(package))
        assert (Version(first), Version(last)) == (oldest, Version(f"{untested.major}.{untested.minor - 1}")), package
    for python in re.findall(r"Python (\d+\.\d+) and newer", text):
        assert SpecifierSet(f">={python}") == PYTHONS


def test_the_workflow_runs_from_the_oldest_to_the_newest():
    for name, specifier in (("python", PYTHONS), ("torch", stated("torch")), ("triton", stated("triton"))):
        versions = sorted(Version(job[name]) for job in JOBS)
        assert all(version in specifier for version in versions), name
        (oldest,) = (bound.version for bound in specifier if bound.operator == ">=")
        assert versions[0].release[:2] == Version(oldest).release[:2], name
    assert max(Version(job["torch"]) for job in JOBS).minor == ends(stated("torch"))[1].minor - 1


def test_the_kernels_were_recorded_with_what_make_test_installs():
    recorded = json.loads((ROOT / "tests/lowerings/kernels.json").read_text())["versions"]
    assert recorded in [{"torch": f"{job['torch']}+cpu", "triton": job["triton"]} for job in JOBS]
    makefile = (ROOT / "Makefile").read_text()
    assert f"TRITON ?= triton=={recorded['triton']}\n" in makefile
    assert f"TORCH ?= torch=={recorded['torch'].removesuffix('+cpu')}\n" in makefile
    assert Version(torch.__version__) in stated("torch")


def test_the_docs_list_the_builds_that_kernels_without_a_gpu_take():
    listed = re.findall(r"torch\s+(\d\S+)\s+for\s+(CPU|CUDA)", (ROOT / "docs/kernels.md").read_text())
    assert sorted((version, kind == "CUDA") for version, kind in listed) == sorted(TESTED)


def test_a_peer_without_masks_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "2.0.6")
    tensors = [torch.empty(1, 1, 8, 4)] * 3 + [torch.empty(1, 1, 8)]
    call = next(
        call
        for name, call in peers.peers(peers.Shape(8, 4, backward=False), tensors).items()
        if name.startswith("flash_sparse_attn")
    )
    with pytest.raises(
        peers.UnavailableError, match=r"version 2\.0\.6 takes no mask: pip install 'flash-sparse-attn<2'"
    ):
        call()
