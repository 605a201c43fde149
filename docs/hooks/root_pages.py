"""mkdocs hook: README.md is the front page, and CHANGELOG.md and CONTRIBUTING.md are pages, where they are."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages; what they link to in docs/ stands beside them in the site."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for mark in ("](", 'src="', 'srcset="'):
            text = text.replace(f"{mark}docs/", mark)
        files.append(File.generated(config, page, content=text))
    return files
