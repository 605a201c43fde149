"""A program, not a test: attention_mass by the kernels generated for sm_90, in Triton's interpreter; prints errors as JSON.

test_kernels.py starts it, because the interpreter and the stand-ins for a CUDA device need their own process.
"""

import json
import warnings

import torch

from flexdma import Lifespans, attention_mass
from flexdma.reference import dense_attention_mass
from tests.comparison import inputs
from tests.lowerings.interpreted_kernels import relative, squashed
from tests.lowerings.test_lifespan_attention import any_lifespans
from tests.lowerings.triton_interpreter import InterpretedCall

AGES = [(20, None)]


def mass(query, key, bias, birth, death):
    """The mass under any lifespans in bands of age, and under plain causal attention: [bands + 1, B, Hkv, K]."""
    lifespans = Lifespans(birth, death)
    bands = attention_mass(query, key, lifespans, bias=bias, ages=AGES, score_mod=squashed)
    return torch.cat([bands, attention_mass(query, key)[None]])


def run() -> None:
    """Print the error of each, and what the kernels are."""
    query, key, _, bias = inputs(2, 2, 1, 100, 150, 16, dtype=torch.bfloat16)
    lifespans = any_lifespans(2, 1, 150, longest=120, seed=0)
    tensors = [query, key, bias, *lifespans]
    call = InterpretedCall(mass, tensors)
    (got,) = call.run(tensors)
    query, key, bias = (tensor.double() for tensor in (query, key, bias))
    bands = dense_attention_mass(query, key, lifespans, bias=bias, ages=AGES, score_mod=squashed)
    want = [*bands, dense_attention_mass(query, key)]
    result = {
        "errors": [relative(*pair) for pair in zip(got, want, strict=True)],
        "graphs": len(call.seen.calls),
        "atomics": sum(len(kernel.atomic_lines) for kernel in call.attention),
        "dtype": str(got.dtype),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
    run()
