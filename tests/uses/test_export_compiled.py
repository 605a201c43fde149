"""AOTInductor: a compiled layer with a state and a compiled decoding step give the eager results, in Python and in C++."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim, export

from flexdma import DynamicMaskAttention

SOURCE = Path(__file__).parent.parent.parent / "docs" / "examples" / "decode.cpp"
# Code that compiles fast.  The default is code that runs fast.
FAST_TO_COMPILE = {"cpp.simdlen": 1, "aot_inductor.debug_compile": True, "aot_inductor.compile_wrapper_opt_level": "O0"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class WithState(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, state):
        return self.layer(hidden_states, state=state, return_state=True)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    made = DynamicMaskAttention(16, 4, 2, 8, 3, recency="slope", qk_norm=True, sinks=1, recent=2)
    torch.nn.init.normal_(made.gate.A)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def packages(layer, tmp_path_factory):
    """Paths of two packages: tokens 2 and more at a time, and one."""
    folder, paths = tmp_path_factory.mktemp("packages"), []
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=64)
    in_small_blocks = copy.copy(layer)
    in_small_blocks.block_size = 16
    for name, module, tokens, shape in (
        ("read", in_small_blocks, 9, {0: batch, 1: length}),
        ("step", layer, 1, {0: batch}),
    ):
        example = (torch.randn(3, tokens, 16), layer.empty_state(3))
        shapes: Any = (shape, [{0: batch}] * len(example[1].tensors()))
        program = export(WithState(module), example, dynamic_shapes=shapes)
        path = str(folder / f"{name}.pt2")
        paths.append(aoti_compile_and_package(program, package_path=path, inductor_configs=FAST_TO_COMPILE))
    return paths


def assert_same_states(got, want):
    """Slots of the top-w may be in any order."""
    for name, tensor in want.tensors().items():
        have, order = getattr(got, name), [state.position.argsort(dim=-1, stable=True) for state in (got, want)]
        if tensor.dim() > 2:
            have, tensor = (
                t.gather(2, o.view(*o.shape, *[1] * (t.dim() - 3)).expand_as(t))
                for t, o in zip((have, tensor), order, strict=True)
            )
        torch.testing.assert_close(have, tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_programs_share_a_state_in_python(layer, packages):
    read, step = map(aoti_load_package, packages)
    for batch, chunks in ((1, [2, 1, 1]), (2, [50, 1, 1, 7, 1])):
        hidden, state, outputs = torch.randn(batch, sum(chunks), 16), layer.empty_state(batch), []
        for chunk in hidden.split(chunks, 1):
            output, state = (step if chunk.shape[1] == 1 else read)(chunk.contiguous(), state)
            outputs.append(output)
        want, after = layer(hidden, return_state=True)
        torch.testing.assert_close(torch.cat(outputs, 1), want, atol=1e-5, rtol=1e-5)
        assert_same_states(state, after)


def test_programs_run_in_cpp(layer, packages, tmp_path):
    root = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", str(SOURCE), "-o", str(tmp_path / "decode"), f"-I{root / 'include'}"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    hidden, state = torch.randn(2, 40, 16), layer.empty_state(2)
    torch.save([hidden, *state.tensors().values()], tmp_path / "tensors.pt")
    subprocess.run([tmp_path / "decode", *packages, "tensors.pt", "outputs.pt", "30"], cwd=tmp_path, check=True)
    output, *tensors = torch.load(tmp_path / "outputs.pt")
    want, after = layer(hidden, return_state=True)
    torch.testing.assert_close(output, want, atol=1e-5, rtol=1e-5)
    assert_same_states(type(after)(*tensors, **after.options()), after)
