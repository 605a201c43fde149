"""`python -m flexdma view`: the page has the text as text, its lifespans equal the dense mask, bad requests write nothing."""

import html
import re
from html.parser import HTMLParser

import pytest
import torch

from flexdma.tools.byte_models.attentions import KINDS
from flexdma.tools.byte_models.checkpoint import load_checkpoint, save_checkpoint
from flexdma.tools.byte_models.labels import byte_labels
from tests.tools.view_cases import data_of, dense_rows, numbers, refused, view, visible


class Elements(HTMLParser):
    """Counts the elements that an HTML parser finds in the page."""

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
    assert data_of(hostile)["tokens"] == byte_labels(text_file.read_bytes())
    assert "innerHTML" not in page


def test_a_file_name_of_markup_stays_text(checkpoint, tmp_path):
    name = "<img src=x onerror=alert(1)>.txt"
    (tmp_path / name).write_text("text")
    assert view(tmp_path / name, checkpoint, tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "img" not in Elements(page).tags
    assert data_of(tmp_path / "page.html")["file"] == name


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
    assert view(text_file, checkpoint, tmp_path / "page.html", "--start", "5", "--tokens", "90") == 0
    data = data_of(tmp_path / "page.html")
    content = text_file.read_bytes()[5:95]
    (model,) = (model for model in data["models"] if model["label"] == f"label of {kind}")
    for layer, dense in zip(model["layers"], dense_rows(checkpoint, kind, content), strict=True):
        for head, expected in zip(layer, dense, strict=True):
            assert torch.equal(visible(data, head), expected)
            assert len(numbers("f", head["gate"])) == 90
            assert (head["capacity"] or 90) == expected.sum(-1).max()
            assert head["attended"] is None


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
    heads = data_of(tmp_path / "page.html")["models"][0]["layers"][1]
    assert numbers("f", heads[0]["gate"]).isnan().all()
    assert numbers("f", heads[1]["gate"]).isposinf().all()


def test_a_part_of_a_long_text_is_shown_and_said(checkpoint, tmp_path, capsys):
    text, out = tmp_path / "long.txt", tmp_path / "page.html"
    text.write_bytes(b"0123456789" * 500)
    small = tmp_path / "one-model"
    save_checkpoint(small, {"dma": load_checkpoint(checkpoint)["dma"].model}, {"dma": "one"})
    assert view(text, small, out) == 0
    assert "bytes 0 to 4,095 of 5,000" in capsys.readouterr().out
    assert view(text, checkpoint, out, "--start", "4990") == 0
    assert "bytes 4,990 to 4,999 of 5,000" in capsys.readouterr().out
    assert data_of(out)["tokens"] == list("0123456789")


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
    refused(capsys, view(text_file, checkpoint, out, "--tokens", "0"), "--tokens")
    refused(capsys, view(text_file, checkpoint, out, "--tokens", "99999999"), "--tokens")
    refused(capsys, view(text_file, checkpoint, tmp_path), "--out")
    refused(capsys, view(text_file, checkpoint, tmp_path / "no" / "folder.html"), "--out")
    refused(capsys, view(text_file, tmp_path / "nowhere", out), "--checkpoint")
    refused(capsys, view(text_file, text_file, out), "--checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "empty.txt"}
