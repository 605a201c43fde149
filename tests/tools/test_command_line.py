"""Common behaviour of commands: one line for a refused request, and no error when the reader closes the pipe."""

import argparse
import importlib
import subprocess
import sys

import pytest

from flexdma.__main__ import CANNOT, COMMANDS, UNREAD, main

BAD = {
    "explain": ["--gates", "no-such-file"],
    "doctor": ["no_such_module:function"],
    "inspect": ["--heads", "3", "--kv-heads", "2"],
    "cost": ["--tokens", "0"],
    "bench": ["--from", "no-such-file"],
    "tune": ["--rounds", "0"],
    "demo": ["--text", "no-such-file"],
    "experiments": ["nothing"],
    "longrun": ["--tokens", "0"],
    "retrofit": ["./no-such-model", "--out", "no-such-folder"],
    "evaluate": ["./no-such-model"],
    "policies": ["--system", "no such system"],
    "view": ["--text", "no-such-file", "--checkpoint", "no-such-file"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_request_that_cannot_be_met_is_one_line(name, capsys):
    assert main([name, *BAD[name]]) == CANNOT
    captured = capsys.readouterr()
    assert captured.err.startswith(f"python -m flexdma {name}: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "flexdma", "explain", "--length", "2048", "--window", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (UNREAD, "")
