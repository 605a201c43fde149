"""`python -m flexdma view`: the page holds the text as text, draws the dense mask, and bad requests write nothing."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from flexdma.__main__ import main
from flexdma.byte_labels import byte_labels
from flexdma.demo.attentions import KINDS
from flexdma.demo.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from flexdma.demo.model import ByteModel, ModelSizes, recorded_gates
from flexdma.reference import dense_visibility

SIZES = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, window=6)
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script> &amp; \"'` @data@ {{x}} ${y}\n"
    "</SCRIPT\t><svg/onload=alert(3)>]]> --> \\u003cb\\u003e é 漢 \u202e\u2028\x00 e\u0301"
)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    models = {kind: ByteModel(kind, SIZES, recency="slope", seed=0) for kind in KINDS}
    with torch.no_grad():
        for kind in ("dma", "dma-recency"):
            for attention in models[kind].attentions():
                attention.gate.A.normal_()
    folder = tmp_path_factory.mktemp("report") / "checkpoint"
    save_checkpoint(folder, models, {kind: f"label of {kind}" for kind in KINDS})
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(HOSTILE.encode() + b"\xff\xc3" + b" and then the rest of it." * 3)
    return path


def view(text: Path, checkpoint: Path, out: Path, *options: str) -> int:
    return main(["view", "--text", str(text), "--checkpoint", str(checkpoint), "--out", str(out), *options])


def data_of(page: str) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def dense_rows(checkpoint: Path, kind: str, content: bytes) -> list[torch.Tensor]:
    """The dense mask [Hkv, Q, K] of each layer."""
    model = load_checkpoint(checkpoint)[kind].model
    with torch.no_grad(), recorded_gates(model) as gates:
        model(torch.tensor([list(content)]))
    if kind == "full":
        return [torch.ones(len(content), len(content), dtype=torch.bool).tril().expand(2, -1, -1) for _ in gates]
    return [dense_visibility(gate, window_size=SIZES.window)[0] for gate in gates]


class Elements(HTMLParser):
    """Counts what an HTML parser makes of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs] + [
            value or "" for name, value in attrs if name in ("src", "href")
        ]


def test_a_text_full_of_markup_stays_text(text_file, checkpoint, tmp_path):
    hostile, tame = tmp_path / "hostile.html", tmp_path / "tame.html"
    (tmp_path / "tame.txt").write_text("nothing but words")
    assert view(text_file, checkpoint, hostile) == 0
    assert view(tmp_path / "tame.txt", checkpoint, tame) == 0
    page = hostile.read_text(encoding="utf-8")
    with_markup, without = Elements(page), Elements(tame.read_text(encoding="utf-8"))
    assert with_markup.tags == without.tags
    assert with_markup.attributes == without.attributes
    assert with_markup.tags.count("script") == 2
    assert "img" not in with_markup.tags
    assert data_of(page)["tokens"] == byte_labels(text_file.read_bytes())
    assert "innerHTML" not in page


def test_a_file_name_of_markup_stays_text(checkpoint, tmp_path):
    name = "<img src=x onerror=alert(1)>.txt"
    (tmp_path / name).write_text("text")
    assert view(tmp_path / name, checkpoint, tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "img" not in Elements(page).tags
    assert data_of(page)["file"] == name


def test_the_page_asks_nothing_of_a_network(text_file, checkpoint, tmp_path):
    assert view(text_file, checkpoint, tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    without_data = re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|fetch\(", re.sub(r"(?m)^\s*//.*", "", without_data)
    )
    assert "default-src 'none'" in html.unescape(page)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lifespans_of_the_page_are_the_dense_mask(kind, text_file, checkpoint, tmp_path):
    assert view(text_file, checkpoint, tmp_path / "page.html", "--start", "5", "--length", "90") == 0
    data = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    content = text_file.read_bytes()[5:95]
    (model,) = (model for model in data["models"] if model["label"] == f"label of {kind}")
    query, birth = torch.arange(90)[:, None], torch.tensor(data["birth"])
    for layer, dense in zip(model["layers"], dense_rows(checkpoint, kind, content), strict=True):
        for head, expected in zip(layer, dense, strict=True):
            assert torch.equal((birth <= query) & (query < torch.tensor(head["death"])), expected)
            assert len(head["gate"]) == 90


def test_bytes_become_readable_labels():
    assert byte_labels("a\n\té漢🙂".encode()) == ["a", "↵", "⇥", "é", "·", "漢", "·", "·", "🙂", "·", "·", "·"]
    assert byte_labels(b"\xff\xc3 \xe6\xbc") == ["⟨FF⟩", "⟨C3⟩", " ", "⟨E6⟩", "⟨BC⟩"]
    assert byte_labels("\u202e\x1b\u0301".encode()) == ["⟨202E⟩", "·", "·", "⟨1B⟩", "◌\u0301", "·"]
    assert all(len(byte_labels(bytes([first, second]))) == 2 for first in range(256) for second in (65, 128, 255))


def test_gates_that_are_not_finite_reach_the_page(text_file, checkpoint, tmp_path):
    broken = tmp_path / "checkpoint"
    models = {kind: trained.model for kind, trained in load_checkpoint(checkpoint).items()}
    with torch.no_grad():
        models["dma"].attentions()[1].gate.A.copy_(torch.tensor([float("nan"), 1e30]))
    save_checkpoint(broken, models, dict.fromkeys(models, "label"))
    assert view(text_file, broken, tmp_path / "page.html") == 0
    heads = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["models"][0]["layers"][1]
    assert set(heads[0]["gate"]) == {"NaN"}
    assert set(heads[1]["gate"]) == {"Infinity"}


def test_a_part_of_a_long_text_is_shown_and_said(checkpoint, tmp_path, capsys):
    text, out = tmp_path / "long.txt", tmp_path / "page.html"
    text.write_bytes(b"0123456789" * 500)
    small = tmp_path / "one-model"
    save_checkpoint(small, {"dma": load_checkpoint(checkpoint)["dma"].model}, {"dma": "one"})
    assert view(text, small, out) == 0
    assert "bytes 0 to 4,095 of 5,000" in capsys.readouterr().out
    assert view(text, checkpoint, out, "--start", "4990") == 0
    assert "bytes 4,990 to 4,999 of 5,000" in capsys.readouterr().out
    assert data_of(out.read_text(encoding="utf-8"))["tokens"] == list("0123456789")


def refused(capsys, code: int, says: str) -> None:
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert says in error


def test_requests_that_cannot_be_met_are_one_line_exit_code_2_and_nothing_written(
    text_file, checkpoint, tmp_path, capsys
):
    out, empty = tmp_path / "page.html", tmp_path / "empty.txt"
    empty.touch()
    refused(capsys, view(tmp_path / "absent", checkpoint, out), "--text")
    refused(capsys, view(tmp_path, checkpoint, out), "--text")
    refused(capsys, view(empty, checkpoint, out), "at least one byte")
    refused(capsys, view(text_file, checkpoint, out, "--start", "-1"), "--start")
    refused(capsys, view(text_file, checkpoint, out, "--start", "100000"), "--start")
    refused(capsys, view(text_file, checkpoint, out, "--length", "0"), "--length")
    refused(capsys, view(text_file, checkpoint, out, "--length", "99999999"), "--length")
    refused(capsys, view(text_file, checkpoint, tmp_path), "--out")
    refused(capsys, view(text_file, checkpoint, tmp_path / "no" / "folder.html"), "--out")
    refused(capsys, view(text_file, tmp_path / "nowhere", out), "--checkpoint")
    refused(capsys, view(text_file, text_file, out), "--checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "empty.txt"}


def corrupt(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "dma.pt"
    content = json.loads(config.read_text())
    description = content["models"]["dma"]
    if how == "cut config":
        config.write_text(config.read_text()[:50])
    elif how == "binary config":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "foreign weights":
        weights.write_bytes(b"no weights at all")
    elif how == "code in weights":
        torch.save({"embedding.weight": Path("x")}, weights)
    elif how == "a list of weights":
        torch.save([1, 2], weights)
    else:
        changed: dict = {
            "other sizes": {"sizes": {**description["sizes"], "width": 64}},
            "odd sizes": {"sizes": {**description["sizes"], "heads": 3}},
            "no heads": {"sizes": {**description["sizes"], "heads": 0}},
            "words for sizes": {"sizes": dict.fromkeys(description["sizes"], "x")},
            "missing sizes": {"sizes": {}},
            "unknown recency": {"recency": "never"},
            "no label": {"label": None},
        }[how]
        description.update(changed)
        config.write_text(json.dumps(content))


CORRUPTIONS = (
    "cut config, binary config, no weights, cut weights, empty weights, foreign weights, code in weights, "
    "a list of weights, other sizes, odd sizes, no heads, words for sizes, missing sizes, unknown recency, no label"
)


@pytest.mark.parametrize("how", CORRUPTIONS.split(", "))
def test_a_corrupt_checkpoint_is_one_line(how, text_file, checkpoint, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    corrupt(folder, how)
    refused(capsys, view(text_file, folder, tmp_path / "page.html"), "--checkpoint")
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    models = {kind: trained.model for kind, trained in load_checkpoint(checkpoint).items()}
    save_checkpoint(folder, models, dict.fromkeys(models, "first"))
    save_checkpoint(folder, models, dict.fromkeys(models, "second"))
    assert {trained.label for trained in load_checkpoint(folder).values()} == {"second"}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, models, dict.fromkeys(models, "third"))
    assert {trained.label for trained in load_checkpoint(folder).values()} == {"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def chromium(page: Path, profile: Path, address: str = "", script: str = "") -> str:
    """The page as Chromium has it after its scripts ran; `script` is appended, in a copy that allows it."""
    if script:
        content = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
        page = page.with_name("scripted.html")
        page.write_text(content.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", f"{page.as_uri()}{address}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def classes_of(dom: str) -> list[str]:
    return re.findall(r'<span data-key="\d+" class="([^"]*)">', dom)


def kept_in(dom: str) -> list[int]:
    return [key for key, names in enumerate(classes_of(dom)) if "kept" in names.split()]


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)")


@pytest.mark.chromium
@needs_chromium
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
        assert "<img" not in dom  # the text holds one, as text
        assert "&lt;img src=x onerror=alert(2)&gt;" in re.sub(r"</?span[^>]*>", "", dom)


@pytest.mark.chromium
@needs_chromium
def test_mouse_and_keyboard_choose_the_query_and_the_head(text_file, checkpoint, tmp_path):
    page = tmp_path / "page.html"
    assert view(text_file, checkpoint, page) == 0
    dense = dense_rows(checkpoint, "dma", text_file.read_bytes())

    def after(actions: str) -> str:
        helpers = """
            const token = (key) => document.querySelector(`[data-key="${key}"]`);
            const mouse = (kind, key) => token(key).dispatchEvent(new MouseEvent(kind, { bubbles: true }));
            const press = (key, more) => dispatchEvent(new KeyboardEvent("keydown", { key, ...more }));
            EventTarget.prototype.tagName ??= "";
        """
        return chromium(page, tmp_path / "profile", script=helpers + actions)

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
