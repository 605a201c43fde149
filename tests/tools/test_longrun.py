"""A short run of longrun: chunk boundaries, a report that follows from the numbers, refusals."""

import json

import pytest

from flexdma.__main__ import main
from flexdma.tools.longrun import report
from flexdma.tools.longrun.measure import Measurements, chunk_sizes


def test_chunks_stop_where_something_is_measured():
    assert list(chunk_sizes(70000, 30000)) == [4096, 30000, 30000, 1440, 4464]
    assert list(chunk_sizes(10, 4)) == [4, 4, 2]


def test_the_report_follows_from_the_numbers():
    measured = Measurements([(4096, 0.5, 2**20), (65536, 8.0, 100 * 2**20), (131072, 16.0, 103 * 2**20)], 2**20, 2**27,
                    {"4,096": 0.002, "131,072": 0.0021})  # fmt: skip
    assert measured.growth == pytest.approx(1.03)
    text = report.table(measured)
    assert "| 65,536 | 8.0 | 8,192 | 100 |" in text
    assert "Peak memory at the end / at 65,536 tokens: 1.030 (+3.0 MiB)" in text
    assert "State: 1.00 MiB; a full cache would hold 128 MiB" in text
    assert "Second / first: 1.050" in text


def test_command(tmp_path, capsys):
    small = ["--chunk", "600", "--window", "8", "--heads", "2", "--kv-heads", "1", "--head-dim", "4",
             "--hidden-size", "8", "--decode", "3"]  # fmt: skip
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    assert main(["longrun", "--tokens", "5000", *small, *files]) == 0
    assert "| 5,000 |" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "run.json").read_text())
    assert [mark[0] for mark in numbers["marks"]][-3:] == [4096, 4696, 5000]
    assert set(numbers["decode_seconds"]) == {"4,096", "5,000"}
    assert (tmp_path / "run.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--decode", "-1"], "--decode: expected at least 0, got -1"),
        (["--heads", "3"], "--heads: expected a multiple of --kv-heads 2, got 3"),
        (["--window", "3000000000"], "--window: expected at most 2147483647, got 3000000000"),
        (["--seed", str(2**70)], "--seed: expected at most 9223372036854775807"),
        (["--window", "many"], "--window: expected a whole number, got 'many'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "cpu:x"], "--device: expected cpu or cuda, got cpu:x"),
        (["--json", "."], "--json: expected a file in a folder that exists, got ."),
        (["--plot", "run.bad"], "--plot: expected a file name that ends in one of"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got tpu"),
        (["--json", "/absent/run.json"], "--json: expected a file in a folder that exists, got /absent/run.json"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["longrun", *arguments]) == 2
    assert message in capsys.readouterr().err
