"""CONTRIBUTING, .github and the hooks name paths, functions and commands that exist."""

import re
from pathlib import Path

import pytest
import yaml

from flexdma.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / ".github" / "pull_request_template.md", *FORMS, *WORKFLOWS, HOOKS]
PATH = r"[\w./-]*/[\w./-]*|[\w-]+\.(?:md|toml)"


def code(text: str) -> list[str]:
    """The text between backticks, and indented lines."""
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4,}(.*)", text, re.MULTILINE)


def test_paths_exist():
    paths = re.findall(rf"`({PATH})`", CONTRIBUTING) + re.findall(r"pytest (\S+)", CONTRIBUTING)
    assert len(paths) > 30
    # NAME is a placeholder: some file matches.
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/").replace("NAME", "*")))] == []


def test_names_stand_in_their_files():
    named = re.findall(rf"`(\w+)` (?:of|in)\s+`({PATH})`", CONTRIBUTING.replace("\n", " "))
    assert len(named) > 8
    missing = [(name, path) for name, path in named if not re.search(rf"\b{name}\b", (ROOT / path).read_text())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page, pytestconfig):
    lines = "\n".join(code(page.read_text()))
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake (\w+)", lines)
    variables = re.findall(r"\b([A-Z]+)=", lines)
    markers = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    assert [name for name in variables if not re.search(rf"^{name} \?=", makefile, re.MULTILINE)] == []
    assert set(re.findall(r"python -m flexdma (\w+)", lines)) <= COMMANDS.keys()
    assert [
        name
        for name in re.findall(r"python -m (tests[\w.]+)", lines)
        if not (ROOT / f"{name.replace('.', '/')}.py").exists()
    ] == []
    assert set(re.findall(r"(?<!python )-m (\w+)", lines)) <= markers


def test_every_marker_is_explained(pytestconfig):
    explained = set(re.findall(r"`(?:-m )?(\w+)`", CONTRIBUTING))
    assert {"gpu", "kernels", "chromium", "slow", "network"} <= explained


def test_forms_ask_once_for_each_thing():
    for form in FORMS:
        content = yaml.safe_load(form.read_text())
        if form.name == "config.yml":
            assert all(link.keys() == {"name", "url", "about"} for link in content["contact_links"])
            continue
        assert {"name", "description", "body"} <= content.keys()
        asked = [field["id"] for field in content["body"]]
        assert len(set(asked)) == len(asked)
    bug = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert "`python -m flexdma doctor`" in str(bug)


def test_hooks_run_the_tools_of_the_project():
    (repository,) = yaml.safe_load(HOOKS.read_text())["repos"]
    assert repository["repo"] == "local"
    makefile = (ROOT / "Makefile").read_text()
    for hook in repository["hooks"]:
        command = hook["entry"].replace(".venv/bin/", "$(BIN)/").removesuffix(" --force-exclude")
        assert command == "make lint" or command in makefile
