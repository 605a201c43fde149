"""One HTML page with the tables and pictures of a measurement, light and dark, that needs no network and no script."""

import base64
import hashlib
import html
import json
from importlib.resources import files

from flexdma.tools.long_context.summary import Summary
from flexdma.tools.long_context.tables import as_html, tables

TITLES = {
    "nll": "Negative log-likelihood against position",
    "needles": "Needles found, by length of the context and depth",
    "heads": "Keys kept by gate in each layer and head, and how well gates predict what is looked at",
}


def page(summary: Summary, drawn: dict[str, dict[str, str]], title: str) -> str:
    """The page.  Names of models, files and devices are escaped.  drawn: as `pictures` returns."""
    style = files("flexdma.tools.long_context").joinpath("page.css").read_text(encoding="utf-8")
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; img-src data:; base-uri 'none'"
    parts = [
        *map(as_html, tables(summary)),
        *(f"<figure><h2>{TITLES[name]}</h2>{_picture(themes, TITLES[name])}</figure>" for name, themes in drawn.items()),
        *(f'<p class="note">{html.escape(note)}</p>' for note in summary.notes()),
        f"<details><summary>How it was measured</summary><pre>{html.escape(how(summary))}</pre></details>",
    ]  # fmt: skip
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def how(summary: Summary) -> str:
    """Machine, versions and plan as JSON."""
    about = {name: value for name, value in summary.about.items() if name not in ("cases", "contenders")}
    return json.dumps(about, indent=1)


def _picture(themes: dict[str, str], title: str) -> str:
    light, dark = (_address(themes[theme]) for theme in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" '
        f'alt="{html.escape(title)}"></picture>'
    )


def _address(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
