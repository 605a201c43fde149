"""The package as users get it: a wheel in an environment without the sources, and an import that needs only torch."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flexdma

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy without symbolic links, which is the harder case."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = [p for name in ("flexdma", "score_mods", "block_masks") for p in (ROOT / name).rglob("*")]
    files = ("pyproject.toml", "README.md", "LICENSE")
    for path in [*tracked, *(ROOT / name for name in files)]:
        inside_link = any(parent.is_symlink() for parent in [path, *path.parents])
        if path.is_file() and not inside_link and "__pycache__" not in path.parts:
            copy = folder / "source" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    built = run(*command, str(folder / "source"))
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture
def installed(wheel, tmp_path):
    folder = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_the_parts_of_the_page(installed, tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from flexdma.tools.view.page import view_page\n"
        "print(view_page({'file': '</script>'}))\n"
    )
    done = run(sys.executable, "-W", "ignore", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [
        (ROOT / "flexdma" / "tools" / "view" / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    ]
    assert all(part in done.stdout for part in parts)
    assert r'{"file":"\u003c/script\u003e"}' in done.stdout


def test_the_wheel_holds_every_file_and_says_that_it_is_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "flexdma/py.typed" in names
    for folder, package in (
        ("flexdma", "flexdma"),
        ("score_mods", "flexdma/score_mods"),
        ("block_masks", "flexdma/block_masks"),
    ):
        for path in (ROOT / folder).rglob("*.*"):
            if "__pycache__" in path.parts:
                continue
            inside = path.relative_to(ROOT / folder).as_posix()
            assert f"{package}/{inside}" in names, inside
    assert not [name for name in names if name.startswith(("tests/", "docs/", "score_mods/", "block_masks/"))]


def test_the_wheel_works_away_from_the_sources(installed, tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import flexdma, torch\n"
        "from flexdma.score_mods import gate_score_mod\n"
        "from flexdma.block_masks import dynamic_block_mask\n"
        f"assert flexdma.__file__.startswith({str(installed)!r}), flexdma.__file__\n"
        f"import flexdma.score_mods; assert flexdma.score_mods.__file__.startswith({str(installed)!r})\n"
        "q, gate = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9)\n"
        "print(flexdma.dynamic_mask_attention(q, q, q, gate, window_size=3).shape)\n"
    )
    done = run(sys.executable, "-W", "ignore", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "torch.Size([1, 2, 9, 4])"


def test_importing_flexdma_needs_torch_alone():
    program = (
        "import sys\n"
        "for name in ('matplotlib', 'rich', 'hypothesis', 'pytest', 'transformers', 'triton', 'numpy'):\n"
        "    sys.modules[name] = None  # importing it raises\n"
        "import flexdma, flexdma.score_mods, flexdma.block_masks, flexdma.reference\n"
    )
    done = run(sys.executable, "-W", "ignore", "-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_version_is_the_same_everywhere():
    assert f"version: {flexdma.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(flexdma.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    done = run(sys.executable, "-m", "flexdma", "--version", cwd=ROOT)
    assert done.stdout.strip() == f"flexdma {flexdma.__version__}"
