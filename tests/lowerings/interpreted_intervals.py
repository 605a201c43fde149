"""A program, not a test: two intervals per key by the kernels generated for sm_90, in Triton's interpreter.

It prints the errors of the output and of all gradients as JSON.  test_kernels.py starts it, because the interpreter and the
stand-ins for a CUDA device need their own process.
"""

import json
import warnings

import torch

from flexdma import Lifespans, lifespan_attention
from flexdma.reference import dense_lifespan_attention
from tests.comparison import inputs
from tests.lowerings.interpreted_kernels import relative, squashed
from tests.lowerings.triton_interpreter import InterpretedCall

NAMES = ("out", "dq", "dk", "dv", "first bias", "second bias")
WINDOW = 20


def intervals(birth):
    """Each key for WINDOW queries, and for 30 more after a gap of 10."""
    second = birth + WINDOW + 10
    return Lifespans(birth, birth + WINDOW), Lifespans(second, second + 30)


def attend(query, key, value, first, second, birth):
    """Flex, in small blocks, so that keys have several periods."""
    return lifespan_attention(
        query, key, value, intervals(birth), bias=[first, second], score_mod=squashed, capacity=64, block_size=(64, 64)
    )


def run() -> None:
    """Print the errors."""
    query, key, value, first = inputs(1, 4, 2, 200, 230, 16, dtype=torch.bfloat16)
    second = inputs(1, 4, 2, 200, 230, 16, dtype=torch.float32, seed=1)[3]
    birth = torch.arange(230, dtype=torch.int32).expand(1, 1, 230).contiguous()
    leaves = [each.requires_grad_() for each in (query, key, value, first, second)]
    call = InterpretedCall(attend, [*leaves, birth])
    gradient = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = call.run([*leaves, birth], gradient)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    query, key, value, *biases = exact
    output = dense_lifespan_attention(query, key, value, intervals(birth), bias=biases, score_mod=squashed)
    want = [output.detach(), *torch.autograd.grad(output, exact, gradient.double())]
    result = {"errors": {name: relative(*pair) for name, *pair in zip(NAMES, got, want, strict=True)}}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
    run()
