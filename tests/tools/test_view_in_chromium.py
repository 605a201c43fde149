"""The page in a browser: it highlights the dense mask, for queries chosen by address, mouse and keyboard."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.converted_cases import make_converted
from tests.tools.view_cases import data_of, dense_rows, numbers, view, visible

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)"),
]


def chromium(page: Path, profile: Path, address: str = "", script: str = "") -> str:
    """The page's elements in Chromium after its scripts ran; `script` is appended in a copy whose policy allows it."""
    if script:
        content = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
        page = page.with_name("scripted.html")
        page.write_text(content.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", f"{page.as_uri()}{address}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def classes_of(dom: str) -> list[str]:
    return re.findall(r'<span data-key="\d+" class="([^"]*)">', dom)


def kept_in(dom: str) -> list[int]:
    return [key for key, names in enumerate(classes_of(dom)) if "kept" in names.split()]


HELPERS = """
    const token = (key) => document.querySelector(`[data-key="${key}"]`);
    const mouse = (kind, key) => token(key).dispatchEvent(new MouseEvent(kind, { bubbles: true }));
    const press = (key, more) => dispatchEvent(new KeyboardEvent("keydown", { key, ...more }));
"""


def test_the_browser_highlights_exactly_the_keys_of_the_dense_mask(text_file, checkpoint, tmp_path):
    page = tmp_path / "page.html"
    assert view(text_file, checkpoint, page) == 0
    content = text_file.read_bytes()
    for model, kind, layer, head, query in ((0, "dma", 0, 1, 40), (1, "dma-recency", 1, 0, 130), (2, "full", 1, 1, 7)):
        address = f"#model={model}&layer={layer}&head={head}&query={query}"
        dom = chromium(page, tmp_path / "profile", address)
        row = dense_rows(checkpoint, kind, content)[layer][head, query]
        assert kept_in(dom) == row.nonzero().flatten().tolist()
        classes = classes_of(dom)
        assert len(classes) == len(content)
        assert [key for key, names in enumerate(classes) if "query" in names.split()] == [query]
        assert all(("future" in names.split()) == (key > query) for key, names in enumerate(classes))
        assert f"Query {query} " in dom
        assert "<img" not in dom  # the text contains one, as text
        assert "&lt;img src=x onerror=alert(2)&gt;" in re.sub(r"</?span[^>]*>", "", dom)


def test_mouse_and_keyboard_choose_the_query_and_the_head(text_file, checkpoint, tmp_path):
    page = tmp_path / "page.html"
    assert view(text_file, checkpoint, page) == 0
    dense = dense_rows(checkpoint, "dma", text_file.read_bytes())

    def after(actions: str) -> str:
        return chromium(page, tmp_path / "profile", script=HELPERS + actions)

    def keys(layer: int, head: int, query: int) -> list[int]:
        return dense[layer][head, query].nonzero().flatten().tolist()

    assert kept_in(after("mouse('mouseover', 50);")) == keys(0, 0, 50)
    assert kept_in(after("mouse('mouseover', 50); mouse('click', 50); mouse('mouseover', 60);")) == keys(0, 0, 50)
    walked = after("mouse('click', 50); press('ArrowRight'); press('ArrowLeft', {shiftKey: true}); press('ArrowDown');")
    assert kept_in(walked) == keys(0, 1, 41)
    assert kept_in(after("press('End'); press('ArrowDown'); press('ArrowDown');")) == keys(
        1, 0, len(text_file.read_bytes()) - 1
    )
    assert "label of dma" in walked


def test_beside_the_kept_keys_stands_what_the_full_model_attends_to(tmp_path):
    page, text = tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text("The clerk wrote it down, é, and nobody asked again.\nThen came winter.")
    assert view(text, make_converted(tmp_path / "model"), page, source="--model") == 0
    data = data_of(page)
    head = data["models"][0]["layers"][1][0]
    query, length = 50, len(data["tokens"])
    keys, probabilities = (
        numbers("H", head["attended"][name]).view(length, -1)[query] for name in ("keys", "probabilities")
    )
    dom = chromium(
        page, tmp_path / "profile", script=HELPERS + f"mouse('click', {query}); press('ArrowDown'); press('ArrowDown');"
    )
    assert kept_in(dom) == visible(data, head)[query].nonzero().flatten().tolist()
    looked = {key for key, names in enumerate(classes_of(dom)) if {"a1", "a2", "a3"} & set(names.split())}
    assert looked == {
        key for key, steps in zip(keys.tolist(), probabilities, strict=True) if steps >= 0.01 * data["steps"]
    }
    (rows,) = re.findall(r'<tbody id="looks">(.*?)</tbody>', dom, re.DOTALL)
    listed = re.findall(
        r"<tr><td>(\d*)</td><td><span[^>]*>.*?</span></td><td>(.*?) %</td><td>(.*?)</td></tr>", rows, re.DOTALL
    )
    assert [int(key) for key, _, _ in listed[:-1]] == keys.tolist()
    assert [float(percent) for _, percent, _ in listed[:-1]] == pytest.approx(
        (100 * probabilities / data["steps"]).tolist(), abs=0.0501
    )
    assert sum(float(percent) for _, percent, _ in listed) == pytest.approx(100, abs=0.05 * len(listed))
    assert [fate == "kept" for _, _, fate in listed[:-1]] == visible(data, head)[query, keys.long()].tolist()
    chosen = re.findall(r'<button [^>]*aria-pressed="true"[^>]*>(\d+)</button>', dom)
    assert chosen == ["9"]
    clicked = chromium(
        page, tmp_path / "profile", script='document.querySelector(\'[data-layer="0"][data-head="1"]\').click();'
    )
    assert "in layer 0, head 1 keeps" in clicked
