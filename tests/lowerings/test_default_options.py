"""Kernel options: the caller's win over tuned ones, these over built-in ones; a measurement by Inductor is left free."""

from types import MappingProxyType

import pytest
import torch

from flexdma import dynamic_mask_attention
from flexdma.lowerings import default_options, flash, tuned
from flexdma.lowerings.choice import check_lowering_options
from flexdma.lowerings.default_options import autotunes, device_options, preferred, transposed_options, with_defaults
from flexdma.lowerings.tuned import Winner, key_of
from flexdma.tools.tune import store

GPU, BLOCK = torch.device("cuda"), (128, 128)
DEFAULTS = (("fwd_BLOCK_M", 128), ("fwd_num_warps", 8), ("bwd_BLOCK_M1", 64), ("bwd_BLOCK_N1", 128))
FORCED = {"FORCE_USE_FLEX_ATTENTION": True}


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """Properties of an H100, as far as the options depend on them, and a file for winners."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned.json"))
    yield tmp_path / "tuned.json"
    tuned.winners_of.cache_clear()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, dict(DEFAULTS) | FORCED),
        ({"num_warps": 4}, {"num_warps": 4, "fwd_BLOCK_M": 128, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128} | FORCED),
        ({"bwd_BLOCK_M1": 16, "fwd_BLOCK_M": 32}, dict(DEFAULTS) | {"bwd_BLOCK_M1": 16, "fwd_BLOCK_M": 32} | FORCED),
        (MappingProxyType({"BLOCK_M": 64}), {"BLOCK_M": 64, **dict(DEFAULTS[1:])} | FORCED),
        ({"BACKEND": "TRITON"}, {"BACKEND": "TRITON", **dict(DEFAULTS)}),
        ({"BACKEND": "FLASH"}, {"BACKEND": "FLASH"}),
    ],
)
def test_each_option_of_the_caller_wins(given, want):
    assert with_defaults(given, DEFAULTS, BLOCK) == want


def test_tiles_divide_the_mask_blocks():
    fitted = with_defaults(None, (*DEFAULTS, ("bwd_BLOCK_N2", 64)), (96, 32))
    assert fitted == {
        "fwd_BLOCK_M": 32, "fwd_num_warps": 8, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_N2": 32, **FORCED
    }  # fmt: skip
    assert transposed_options(None, (32, 128), torch.bfloat16, False) == FORCED | {
        "BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4
    }  # fmt: skip


def test_the_transposed_pass_exchanges_the_callers_tile_and_leaves_the_rest_to_a_measurement():
    given = {"BLOCK_M": 32, "BLOCK_N": 64, "fwd_num_warps": 2, "num_stages": 1}
    exchanged = {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 1} | FORCED
    assert transposed_options(given, BLOCK, torch.bfloat16, False) == exchanged
    assert transposed_options(None, BLOCK, torch.bfloat16, True) == FORCED
    assert transposed_options(None, BLOCK, torch.float32, False) == FORCED


def test_a_tuned_winner_replaces_the_built_in_options(h100):
    call = (GPU, torch.bfloat16, 64, 4, True)
    assert dict(device_options(*call)) == dict(preferred((9, 0), torch.bfloat16, 64)) != {}
    assert default_options.block_size_of(*call) == BLOCK
    winner = Winner(key_of(*call[:4], trains=True), (256, 128), {"fwd_num_warps": 4}, 1.0, 2.0)
    store.keep(h100, winner)
    tuned.winners_of.cache_clear()
    assert device_options(*call) == (("fwd_num_warps", 4),)
    assert default_options.block_size_of(*call) == (256, 128)
    assert dict(device_options(*call[:4], False)) == dict(preferred((9, 0), torch.bfloat16, 64))


def test_calls_without_a_score_mod_have_a_tile_and_in_inference_blocks_of_their_own(h100, monkeypatch):
    call = (GPU, torch.bfloat16, 128, 4)
    assert dict(device_options(*call, True))["fwd_BLOCK_N"] == 64
    assert dict(device_options(*call, True, True)) == dict(preferred((9, 0), torch.bfloat16, 128, True))
    assert dict(device_options(*call, False, True))["fwd_BLOCK_N"] == 32
    assert dict(device_options(GPU, torch.bfloat16, 64, 4, False, True)) == dict(preferred((9, 0), torch.bfloat16, 64))
    assert default_options.block_size_of(*call, False) == (128, 64)
    assert default_options.block_size_of(*call, True) == BLOCK
    query = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(default_options, "block_size_of", lambda *facts: facts[-1])
    for options, has_tile in (({"BLOCK_M": 64}, True), ({"fwd_BLOCK_N": 128}, True), ({"num_warps": 8}, False)):
        assert default_options.default_blocks(query, 2, False, options) == has_tile


def test_tiles_of_the_caller_and_of_a_measurement_fit_the_block(h100):
    """Also where a tuned winner has smaller ones."""
    call = (GPU, torch.bfloat16, 128, 4, False)
    store.keep(h100, Winner(key_of(*call[:4], trains=False), (128, 64), {}, 1.0, 2.0))
    tuned.winners_of.cache_clear()
    assert default_options.block_size_of(*call) == (128, 64)
    assert default_options.block_size_of(*call, True) == BLOCK
    with torch._inductor.config.patch(max_autotune=True):
        assert default_options.block_size_of(*call) == BLOCK


@pytest.mark.parametrize("option", ["PRESCALE_QK", "fwd_PRESCALE_QK", "bwd_PRESCALE_QK"])
def test_scores_in_another_unit_than_gates_are_refused(option):
    with pytest.raises(ValueError, match="kernel_options: expected no PRESCALE_QK"):
        check_lowering_options("flex", torch.bfloat16, None, {option: True})
    check_lowering_options("flex", torch.bfloat16, None, {"PRESCALE_QK": False})


def test_other_gpus_keep_what_inductor_chooses():
    assert preferred((8, 0), torch.bfloat16, 64) == preferred((10, 0), torch.bfloat16, 128) == ()


def number_of_options(x):
    return x + len(device_options(GPU, torch.bfloat16, 64, 4, True)) + 100 * autotunes()


@pytest.mark.parametrize(
    ("how", "autotuned"),
    [
        ({}, False),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, True),
        ({"options": {"max_autotune": True}}, True),
        ({"mode": "reduce-overhead"}, False),
        ({"backend": "eager"}, False),
    ],
)
def test_max_autotune_is_left_the_choice_of_sizes(h100, how, autotuned):
    compiled = torch.compile(number_of_options, fullgraph=True, **how)
    assert compiled(torch.zeros(2)).tolist() == [100.0 if autotuned else 4.0] * 2
    with torch._inductor.config.patch(max_autotune=True):
        assert number_of_options(0) == 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ""),
        ({"device": torch.device("cpu")}, "computes on NVIDIA GPUs, got tensors on cpu"),
        ({"dtype": torch.float32}, r"computes in bfloat16 and float16, got torch.float32"),
        ({"head_dims": (64, 20)}, r"multiples of 8, got (64, 20)"),
        ({"sinks_train": True}, "no gradient of the log-sum-exp, which sink_logits need"),
        ({"capability": (8, 0)}, "for compute capabilities 9 to 11, got 8"),
        ({"installed": False}, "needs the package flash-attn-4: pip install --pre flash-attn-4"),
    ],
)
def test_flash_names_what_it_cannot_compute(h100, monkeypatch, change, named):
    call = {"device": GPU, "dtype": torch.bfloat16, "head_dims": (64, 64), "sinks_train": False} | change
    capability, installed = call.pop("capability", (9, 0)), call.pop("installed", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert named in flash.refusal(**call)
    assert bool(flash.refusal(**call)) == bool(named)


def test_flash_on_a_cpu_is_refused_by_the_operator():
    query, gate = torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32)
    with pytest.raises(ValueError, match="kernel_options: BACKEND 'FLASH' computes on NVIDIA GPUs, got tensors on cpu"):
        dynamic_mask_attention(
            query, query, query, gate, window_size=4, lowering="flex", kernel_options={"BACKEND": "FLASH"}
        )
