"""Numbers -> one HTML file, with style and script inside, that asks nothing of a network.

The text may be any bytes, so none of it becomes markup: it stands in a JSON block in which `<`, `>` and `&` are escapes,
and the script writes it with textContent.  A content security policy names the one script and the one style that may
work, by their hashes.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

# As \u escapes JSON reads them back, and no HTML parser sees them; the last two end a line in older JavaScript.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def view_page(record: dict[str, Any]) -> str:
    """The page that shows `view_record`'s numbers."""
    style, script = _part("page.css"), _part("page.js")
    data = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPES)
    parts = {"@policy@": _policy(style, script), "@style@": style, "@script@": script, "@data@": data}
    page = _part("page.html")
    # The data last: a text that holds a placeholder is not looked at again.
    for placeholder, content in parts.items():
        page = page.replace(placeholder, content)
    return page


def _policy(style: str, script: str) -> str:
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _part(name: str) -> str:
    return files("flexdma.tools.view").joinpath(name).read_text(encoding="utf-8")
