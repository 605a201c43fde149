"""The doctor finds each problem with its line, and nothing in a healthy layer.  All tests but one only capture graphs."""

import dataclasses
import importlib.metadata
import inspect
import json

import pytest
import torch

import flexdma
from flexdma.__main__ import main
from flexdma.tools.doctor.environment import Environment, shortcomings
from tests.tools import patients

X = torch.randn(4)


def examined(function, *calls):
    return flexdma.doctor(function, *calls, backend="eager")


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return f"patients.py:{first + next(number for number, line in enumerate(lines) if text in line)}"


def test_a_healthy_layer_is_healthy_and_keeps_its_gradients():
    layer = patients.layer()
    report = examined(layer, (torch.randn(1, 40, 32),))
    assert report.ok
    assert (report.graphs, report.recompilations, report.calls) == (1, 0, 2)
    assert not report.of("graph break")
    assert "healthy" in str(report)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_graph_break_is_found_with_its_line_and_a_remedy(capsys):
    report = examined(patients.prints, (X,))
    (found,) = report.of("graph break")
    assert not report.ok
    assert line_of(patients.prints, "the graph break") in found.where
    assert "is_compiling" in found.do
    assert "print" in found.what


def test_a_function_that_is_not_compiled_at_all_is_found(capsys):
    (found,) = examined(patients.prints_in_a_loop, (X,)).of("graph break")
    assert "runs uncompiled" in found.what
    assert line_of(patients.prints_in_a_loop, "print(") in found.where


def test_a_varying_python_number_recompiles():
    report = examined(patients.scales, (X, 1), (X, 2), (X, 3))
    (found,) = report.of("recompilation")
    assert not report.ok
    assert "factor == 1" in found.what
    assert "patients.py" in found.where
    assert "tensor" in found.do


def test_a_constant_python_number_does_not():
    assert examined(patients.scales, (X, 2), (X + 1, 2)).recompilations == 0


def test_a_size_that_torch_makes_dynamic_is_a_note():
    report = examined(patients.scales, (X, 2), (torch.randn(5), 2), (torch.randn(6), 2))
    assert report.ok
    assert [found.level for found in report.of("recompilation")] == ["note"]


def test_a_function_compiled_for_each_size_is_a_problem():
    compiled = torch.compile(patients.scales, backend="eager", dynamic=False)
    (found,) = examined(compiled, *[(torch.randn(n), 2) for n in (4, 5, 6)]).of("recompilation")
    assert found.level == "problem"
    assert "pad to few lengths" in found.do


def test_one_call_is_made_twice_so_that_changing_state_shows():
    (found,) = examined(patients.CountsItsCalls(), (X,)).of("recompilation")
    assert "register_buffer" in found.do


def test_the_recompile_limit_is_found_and_its_causes_are_one_finding():
    report = examined(patients.CountsItsCalls(), *[(X,)] * 10)
    assert len(report.of("recompile limit")) == 1
    assert len(report.of("recompilation")) == 1
    assert "7 times" in report.of("recompilation")[0].what


def test_flex_attention_outside_compiled_code_is_found_and_inside_is_not():
    x = torch.randn(1, 1, 128, 16)
    (found,) = examined(patients.attends_behind_a_break, (x,)).of("eager FlexAttention")
    assert line_of(patients.attends_uncompiled, "the eager call") in found.where
    assert not examined(patients.attends, (x,)).of("eager FlexAttention")


def test_a_compiled_function_is_called_as_it_is():
    compiled = torch.compile(patients.attends, backend="eager")  # which compiles no attention
    report = examined(compiled, (torch.randn(1, 1, 128, 16),))
    assert len(report.of("eager FlexAttention")) == 1


def test_an_error_is_a_finding():
    report = examined(patients.scales, (X, torch.randn(3)))
    (found,) = [finding for finding in report.findings if finding.level == "problem"]
    assert found.kind == "error"
    assert "patients.py" in found.where


def test_float64_everywhere_is_a_problem_and_in_the_gate_a_note():
    double = X.double()
    (found,) = examined(patients.scales, (double, double)).of("float64")
    assert found.level == "problem"
    (found,) = examined(patients.scales, (X, double)).of("float64")
    assert found.level == "note"


def test_the_doctor_leaves_torch_as_it_was():
    module = __import__("flexdma.tools.doctor.watch", fromlist=["flex_operator"]).flex_operator
    before = module.math_attention
    examined(patients.scales, (X, 1))
    assert module.math_attention is before
    assert not torch._dynamo.utils.get_compilation_metrics()


def test_json_has_every_finding():
    data = json.loads(examined(patients.scales, (X, 1), (X, 2)).to_json())
    assert data["ok"] is False
    assert {"level", "kind", "what", "where", "do"} == set(data["findings"][0])


HERE = Environment("2.13.0", "3.6.0", "3.11", None, None, True, "g++")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"torch": "2.10.1"}, True),
        ({"torch": "2.15.0"}, False),
        ({"transformers": "5.16.1"}, True),
        ({"transformers": "5.25.0"}, False),
        ({"gpu": "a GPU", "cuda": "13.0", "triton": None}, True),
        ({"cuda": "13.0"}, False),
        ({"cpp_compiler": None}, True),
        ({"avx2": False}, False),
    ],
)
def test_what_the_machine_lacks_is_said(change, problem):
    ((is_problem, what, do),) = shortcomings(dataclasses.replace(HERE, **change))
    assert is_problem == problem
    assert what
    assert do


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1", "2.13.0+cpu", "2.14.1+cu130"])
def test_supported_versions_are_fine(version):
    assert shortcomings(dataclasses.replace(HERE, torch=version)) == []


def test_without_an_installation_the_supported_versions_are_unknown(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    ((is_problem, what, _),) = shortcomings(HERE)
    assert not is_problem
    assert "flexdma is not installed" in what


def test_the_self_check_passes(capsys):
    assert main(["doctor", "--backend", "eager"]) == 0
    assert "healthy" in capsys.readouterr().out


def test_the_command_runs_an_entry_point(capsys):
    assert main(["doctor", "tests.tools.patients:healthy_call", "--backend", "eager"]) == 0
    assert main(["doctor", "tests.tools.patients:broken_call", "--backend", "eager", "--json"]) == 1
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["findings"][0]["kind"] == "graph break"
    assert (
        main(
            ["doctor", "tests.tools.patients:scales", "--calls", "tests.tools.patients:two_calls", "--backend", "eager"]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:function"], "MODULE:FUNCTION: expected a module that can be imported, got 'nowhere'"),
        (["tests.tools.patients"], "MODULE:FUNCTION: expected MODULE:FUNCTION, got 'tests.tools.patients'"),
        (["tests.tools.patients:absent"], "which has no 'absent'"),
        (["tests.tools.patients:fails"], "tests.tools.patients:fails() raised RuntimeError: no data"),
        (["tests.tools.patients:no_call"], "expected it to return (callable, [arguments of a call, ...]), got Tensor"),
        (["--calls", "tests.tools.patients:two_calls"], "--calls: expected MODULE:FUNCTION to call as well"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    assert main(["doctor", *arguments, "--backend", "eager"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_arguments_name_themselves():
    with pytest.raises(TypeError, match=r"fn_or_module: expected a function or an nn\.Module, got int"):
        flexdma.doctor(3, (X,))  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match="calls: expected at least one"):
        flexdma.doctor(patients.prints)
    with pytest.raises(TypeError, match=r"calls: expected tuples .* got Tensor"):
        flexdma.doctor(patients.prints, X)  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match="backend: expected one of 'inductor', 'eager'"):
        flexdma.doctor(patients.prints, (X,), backend="cuda")
