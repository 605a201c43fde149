"""Every Python block of the README and of docs/ runs, each in its own process and an empty folder; so do the examples."""

import importlib
import importlib.util
import pkgutil
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

import flexdma
from tests.doc_blocks import run_block
from tests.integrations.fake_torchtitan import torchtitan_or_stand_in

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# torchtitan needs an environment of its own.
MISSING = {"torchtitan.md": importlib.util.find_spec("torchtitan") is None}
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.name}-{number}",
        marks=[pytest.mark.skipif(MISSING.get(page.name, False), reason="needs a package that is not installed")],
    )
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
# Packages whose `__all__` is public; the names that flexdma itself has are added.
PUBLIC = ("score_mods", "block_masks", "distributed", "integrations.torchtitan", "integrations.transformers",
          "page_selection", "plots", "policies", "tools.cost", "tools.doctor", "tools.explain", "tools.inspect")  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block, tmp_path):
    errors = run_block(block, tmp_path)
    assert errors is None, errors[-2000:]


@pytest.mark.parametrize(
    ("name", "options"), [("train", {"steps": 2}), ("stream", {"chunks": 2}), ("convert", {"steps": 1})]
)
def test_the_example_runs(name, options):
    main = runpy.run_path(str(DOCS / "examples" / f"{name}.py"))["main"]
    assert main(**options) > 0


def test_the_readme_shows_three_ways():
    assert sum("README" in str(block.id) for block in BLOCKS) == 3


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r'\]\(([^)#]+)\)|src(?:set)?="([^"]+)"', page.read_text()):
            target = "".join(link)
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_has_every_page_once():
    shown = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    # These are at the root of the repository; docs/hooks/root_pages.py adds them.
    added = ["index.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    assert sorted(shown) == sorted([*added, *(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))])


def test_the_reference_has_every_public_name():
    identifiers = [
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    with torchtitan_or_stand_in():
        documented = [pkgutil.resolve_name(name) for name in identifiers]
        modules = [flexdma, *(importlib.import_module(f"flexdma.{name}") for name in PUBLIC)]
    missing = [
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if name != "__version__"
        and not isinstance(getattr(module, name), types.ModuleType)
        and not any(getattr(module, name) is found for found in documented)
    ]
    assert missing == []


def test_docstrings_become_markdown(monkeypatch):
    stub = types.SimpleNamespace(Extension=object)  # make test installs no griffe
    monkeypatch.setitem(sys.modules, "griffe", stub)
    markdown = runpy.run_path(str(DOCS / "hooks" / "plain_docstrings.py"))["markdown"]
    docstring = """Keeps some.

query, key [B, H]: the text
    goes on: here.
dtype: of all.  device: where.
The Note: is none.

    keep(query)
      key

Raises: never.
name_of_a_function    what it does"""
    assert (
        markdown(docstring, {"query", "key", "dtype", "device"})
        == """Keeps some.

- `query, key [B, H]`: the text
    goes on: here.
- `dtype`: of all.
- `device`: where.

The Note: is none.

```text
keep(query)
  key
```

Raises: never.

- `name_of_a_function`: what it does"""
    )


def test_the_pictures_are_drawn(tmp_path):
    """docs/pictures.py makes those that the pages show."""
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["main"](tmp_path)
    assert {path.name for path in drawn} == {path.name for path in DOCS.glob("packing*.png")}
    assert all(path.stat().st_size > 10_000 for path in drawn)
