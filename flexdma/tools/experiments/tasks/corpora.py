"""Texts that every machine with PyTorch has: the documentation of Python, and that of a package that PyTorch requires."""

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from flexdma.tools.byte_models.text import Text, TextError, load_text, split_text


def _networkx(context: int) -> Text:
    """The docstrings of networkx's modules in the order of their paths, tests left out."""
    found = importlib.util.find_spec("networkx")
    if found is None or found.origin is None:
        raise TextError("--text: expected a file, because networkx is not installed, got nothing")
    root = Path(found.origin).parent
    files = sorted(path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts)
    content = "\n\n".join(text for path in files for text in _docstrings(path))
    return split_text("docstrings of networkx", content.encode(), context)


# name: context -> text
CORPORA: Mapping[str, Callable[[int], Text]] = {
    "python": lambda context: load_text(None, context),
    "networkx": _networkx,
}


@lru_cache(maxsize=4)
def corpus(name: str, context: int) -> Text:
    """The text of one of CORPORA, or of a file.  Raises TextError."""
    return CORPORA[name](context) if name in CORPORA else load_text(name, context)


@lru_cache(maxsize=4)
def digest(name: str, context: int) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a corpus's bytes, in which versions of a text differ."""
    text, found = corpus(name, context), hashlib.sha256()
    for part in (text.training, text.validation):
        found.update(bytes(part.tolist()))
    return found.hexdigest()[:16]


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
