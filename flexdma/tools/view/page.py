"""Numbers -> one HTML file, with style and script inside, that needs no network.

The text may be any bytes, so none of it may become markup: the page has it in a JSON block in which `<`, `>` and `&` are
escaped, and the script writes it with textContent.  A content security policy allows only this script and this style, by
their hashes.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

# JSON reads \u escapes back, and an HTML parser does not see them.  The last two characters end a line in older JavaScript.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
SCRIPTS = ("data.js", "panel.js", "page.js")  # in the order in which each uses what stands before it


def view_page(record: dict[str, Any]) -> str:
    """The page for the numbers of `view_record`."""
    style, script = _part("page.css"), "".join(map(_part, SCRIPTS))
    data = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPES)
    parts = {"@policy@": _policy(style, script), "@style@": style, "@script@": script, "@data@": data}
    page = _part("page.html")
    # Insert the data last, so that a placeholder in the text is not replaced.
    for placeholder, content in parts.items():
        page = page.replace(placeholder, content)
    return page


def _policy(style: str, script: str) -> str:
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _part(name: str) -> str:
    return files("flexdma.tools.view").joinpath(name).read_text(encoding="utf-8")
