"""Bad input: a ValueError or TypeError that names the argument, what was expected and what came."""

import pytest
import torch

import flexdma
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import inputs

GOOD = dict(zip(("query", "key", "value", "gate"), inputs(2, 4, 2, 8, 8, 16, dtype=torch.float32), strict=True))


def z(*shape, **options):
    return torch.zeros(*shape, **options)


CASES = [
    ({"query": [1]}, TypeError, r"query: expected a tensor \[B, Hq, Q, D\], got list"),
    ({"query": z(2, 8, 16)}, ValueError, r"query: expected \[B, Hq, Q, D\], got \[2, 8, 16\]"),
    ({"query": z(2, 3, 8, 16)}, ValueError, "query: expected a multiple of key's 2 heads, got 3 heads"),
    ({"query": z(2, 0, 8, 16)}, ValueError, "query: expected at least 1 head, got 0"),
    ({"query": z(2, 4, 9, 16)}, ValueError, "query: expected at most K = 8 queries .*, got 9"),
    (
        {name: z(2, 4, 8, 16).to(torch.float8_e4m3fn) for name in ("query", "key", "value")},
        TypeError,
        "query: expected a floating point dtype of at least 16 bits, got torch.float8_e4m3fn",
    ),
    (
        {"query": z(2, 4, 8, 16, dtype=torch.int32)},
        TypeError,
        "query: expected a floating point dtype, got torch.int32",
    ),
    ({"key": z(2, 2, 8, 17)}, ValueError, r"key: expected \[2, Hkv, K, 16\], got \[2, 2, 8, 17\]"),
    ({"key": z(2, 2, 8, 16).half()}, TypeError, "key: expected torch.float32 as query has, got torch.float16"),
    ({"value": z(2, 2, 7, 16)}, ValueError, r"value: expected \[2, 2, 8, Dv\], got \[2, 2, 7, 16\]"),
    ({"gate": z(2, 8, 8)}, ValueError, r"gate: expected \[2, 2, 8\], got \[2, 8, 8\]"),
    ({"gate": z(2, 2, 8, dtype=torch.int64)}, TypeError, "gate: expected a floating point dtype, got torch.int64"),
    ({"gate": z(2, 2, 8, device="meta")}, ValueError, "gate: expected a tensor on cpu, got one on meta"),
    ({"window_size": 0}, ValueError, "window_size: expected at least 1, got 0"),
    ({"window_size": 2.0}, TypeError, "window_size: expected an int or one int per key/value head, got float"),
    ({"window_size": True}, TypeError, "window_size: expected an int, got bool"),
    ({"window_size": [1, 2, 3]}, ValueError, "window_size: expected one int per key/value head = 2, got 3"),
    ({"window_size": None}, TypeError, "window_size: expected an int or one int per key/value head, got None"),
    (
        {"selection": "best"},
        ValueError,
        "selection: expected one of 'causal', 'global', 'threshold', 'sliding', 'full', got 'best'",
    ),
    ({"sinks": -1}, ValueError, "sinks: expected at least 0, got -1"),
    ({"recent": 1.5}, TypeError, "recent: expected an int, got float"),
    ({"key_padding_mask": z(2, 8)}, TypeError, "key_padding_mask: expected torch.bool .*, got torch.float32"),
    ({"key_padding_mask": z(2, 7).bool()}, ValueError, r"key_padding_mask: expected \[2, 8\], got \[2, 7\]"),
    ({"document_ids": z(2, 8)}, TypeError, "document_ids: expected an integer dtype, got torch.float32"),
    ({"document_ids": z(8).int()}, ValueError, r"document_ids: expected \[2, 8\], got \[8\]"),
]
ONLY_OPERATOR = [
    ({"recent": 2**40}, ValueError, "recent: expected at most 2147483647, as positions are int32, got 1099511627776"),
    ({"query": z(2, 4, 0, 16)}, ValueError, "query: expected at least 1 position, got 0"),
    ({"block_size": (1, 2, 3), "lowering": "flex"}, ValueError, r"block_size: expected one int or \(rows, keys\)"),
    ({"scale": "x"}, TypeError, "scale: expected a number, got str"),
    ({"score_mod": 3}, TypeError, "score_mod: expected a function, got int"),
    ({"kernel_options": 5, "lowering": "flex"}, TypeError, "kernel_options: expected a dict, got int"),
    ({"lowering": "cuda"}, ValueError, "lowering: expected one of None, 'flex', 'gather', 'dense', got 'cuda'"),
    ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
    ({"block_size": (64, 64), "lowering": "gather"}, TypeError, "block_size: expected an int, got tuple"),
    ({"block_size": 64, "lowering": "dense"}, ValueError, "block_size: expected None for lowering='dense', got 64"),
    ({"kernel_options": {}, "lowering": "gather"}, ValueError, "kernel_options: expected None for lowering='gather'"),
    ({"dropout": 0.1}, TypeError, "dropout"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), CASES + ONLY_OPERATOR, ids=lambda case: str(case)[:60])
def test_the_operator_names_the_argument(wrong, error, message):
    with pytest.raises(error, match=message):
        flexdma.dynamic_mask_attention(**{**GOOD, "window_size": 3, **wrong})


@pytest.mark.parametrize(("wrong", "error", "message"), CASES, ids=lambda case: str(case)[:60])
def test_the_specification_names_the_argument(wrong, error, message):
    with pytest.raises(error, match=message):
        dense_dynamic_mask_attention(**{**GOOD, "window_size": 3, **wrong})


@pytest.mark.parametrize("attention", [flexdma.dynamic_mask_attention, dense_dynamic_mask_attention])
def test_a_score_mod_that_returns_no_tensor(attention):
    with pytest.raises(TypeError, match="score_mod: expected a function that returns a tensor, got NoneType from it"):
        attention(**GOOD, window_size=3, score_mod=lambda *_: None)


@pytest.mark.parametrize("function", [flexdma.causal_top_w, flexdma.global_top_w, flexdma.sliding_window])
def test_selections_name_the_argument(function):
    with pytest.raises(ValueError, match=r"gate: expected \[B, Hkv, K\], got \[2, 8\]"):
        function(z(2, 8), 3)
    with pytest.raises(ValueError, match="window_size: expected at least 1, got -1"):
        function(z(1, 2, 8), -1)
