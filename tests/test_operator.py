"""The operator by the gather lowering, which runs everywhere, compared with the dense specification in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexdma
from flexdma.lowerings import fused_cut, plain
from flexdma.lowerings import gather as gather_module
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.score_mods import alibi_score_mod, softcap_score_mod
from flexdma.tools.shapes import Shape
from flexdma.tools.shapes import inputs as inputs_of
from flexdma.tools.timing import backward_of, peak_bytes
from tests.comparison import assert_same, gather, inputs, with_gradients
from tests.lifespans.gate_strategies import gates, selections


@pytest.fixture
def plain_path(monkeypatch):
    monkeypatch.setattr(gather_module, "is_fusible", lambda *call: False)


@pytest.fixture(params=["fused", "plain"])
def path(request):
    """Both paths of gather."""
    if request.param == "plain":
        request.getfixturevalue("plain_path")


def assert_same_in_training_and_inference(attend, tensors, **options):
    assert_same(attend, tensors, **options)
    assert_same(attend, tensors, gradients=False, **options)


documents = torch.tensor([[0] * 50 + [1] * 3 + [2] * 76, [4] * 129])
left_padding = torch.arange(129) >= torch.tensor([[0], [40]])
right_padding = torch.arange(129) < torch.tensor([[129], [77]])

VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "global": {"selection": "global"},
    "threshold": {"selection": "threshold", "window_size": None},
    "threshold and window": {"selection": "threshold"},
    "sinks": {"sinks": 3},
    "recent": {"recent": 5},
    "left padding": {"key_padding_mask": left_padding},
    "right padding": {"key_padding_mask": right_padding, "sinks": 1},
    "documents": {"document_ids": documents, "sinks": 2, "recent": 2},
    "documents and padding, global": {
        "document_ids": documents,
        "key_padding_mask": right_padding,
        "selection": "global",
    },
    "scale": {"scale": 0.7},
    "softcap": {"score_mod": softcap_score_mod(2.0)},
    "windows per head": {"window_size": [4, 60]},
    "learned sinks": {"sink_logits": torch.linspace(-1, 2, 4, dtype=torch.float64)},
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("queries", [129, 45, 1])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_equals_the_specification(name, queries):
    tensors = inputs(2, 4, 2, queries, 129, 16)
    assert_same_in_training_and_inference(gather, tensors, tolerance=1e-12, **{"window_size": 20, **VARIANTS[name]})


@pytest.mark.parametrize(
    ("query_heads", "heads", "gate_heads", "size", "value_size"),
    [(3, 3, 3, 16, 16), (4, 1, 1, 32, 16), (6, 2, 1, 16, 48), (2, 2, 1, 256, 128), (5, 5, 5, 80, 96)],
)
def test_heads_and_sizes(query_heads, heads, gate_heads, size, value_size):
    tensors = inputs(1, query_heads, heads, 65, 65, size, value_size, gate_heads=gate_heads)
    assert_same_in_training_and_inference(gather, tensors, tolerance=1e-12, window_size=9)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1025])
@pytest.mark.parametrize("block_size", [None, 32])
def test_lengths(length, block_size):
    tensors = inputs(1, 2, 1, length, length, 16)

    def attend(*tensors, **options):
        return gather(*tensors, block_size=block_size, **options)

    assert_same_in_training_and_inference(attend, tensors, tolerance=1e-12, window_size=40)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 17), st.data())
def test_any_shape_and_selection(keys, window, block_size, data):
    options = data.draw(selections(keys))
    options["selection"] = data.draw(st.sampled_from(["causal", "global", "threshold"]))
    queries = data.draw(st.integers(1, keys))
    tensors = inputs(1, 2, 2, queries, keys, 4, seed=keys * 100 + window)
    tensors[3][..., data.draw(st.integers(0, keys - 1))] = data.draw(st.sampled_from([-torch.inf, 0.0, 1.0]))

    def attend(*tensors, **options):
        return gather(*tensors, block_size=block_size, **options)

    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(gather_module, "is_fusible", lambda *call: False)
        assert_same_in_training_and_inference(attend, tensors, tolerance=1e-12, window_size=window, **options)


@pytest.mark.usefixtures("plain_path")
@pytest.mark.parametrize("kept", [2**40, 0])
def test_chunks_and_checkpoints_change_nothing(monkeypatch, kept):
    tensors = inputs(2, 4, 2, 129, 129, 16)
    monkeypatch.setattr(plain, "CHUNK_ELEMENTS", 4000)
    monkeypatch.setattr(plain, "KEPT_ELEMENTS", kept)

    def attend(*tensors, **options):
        return gather(*tensors, block_size=16, **options)

    assert_same(attend, tensors, tolerance=1e-12, window_size=20)


@pytest.mark.parametrize("scores", [1, 4000, 30_000, 2**40])
@pytest.mark.parametrize("gate_heads", [1, 3])
def test_blocks_of_unequal_numbers_of_living_keys_may_share_a_chunk(monkeypatch, scores, gate_heads):
    """A chunk of one block, several blocks, several heads, or everything; the first blocks see no key."""
    monkeypatch.setattr(fused_cut, "SCORES_PER_THREAD", scores)
    tensors = inputs(2, 6, 3, 90, 129, 16, gate_heads=gate_heads)
    mask = torch.arange(129) >= torch.tensor([[75], [0]])
    tensors[1][0, :, :75] = torch.nan
    tensors[2][0, :, :75] = torch.inf
    seen = [*tensors[:1], *(t.nan_to_num(0.0, 0.0) for t in tensors[1:3]), tensors[3]]
    options = {"window_size": 20, "key_padding_mask": mask}
    want = with_gradients(dense_dynamic_mask_attention, seen, **options)
    with torch.no_grad():
        inference = gather(*tensors, block_size=8, **options)
    torch.testing.assert_close(inference, want[0], atol=1e-12, rtol=0)
    for a, b in zip(with_gradients(gather, tensors, block_size=8, **options), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@given(gates(kinds=("ties", "constant", "special", "sorted")), st.integers(1, 12), st.sampled_from([1, 3, 16, None]))
def test_gates_of_every_kind(gate, window, block_size):
    """NaN and infinite gates give NaN to exactly the queries that see them."""
    query, key, value, _ = inputs(1, 2, gate.shape[1], gate.shape[2], gate.shape[2], 4, dtype=torch.float32)
    got = gather(query, key, value, gate, window_size=window, block_size=block_size)
    want = dense_dynamic_mask_attention(query.double(), key.double(), value.double(), gate, window_size=window)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("value_size", [3, 2])
def test_gradients_by_finite_differences(value_size):
    """First and second ones, and several cotangents at once; with unequal head sizes by plain operations."""
    tensors = [t.requires_grad_() for t in inputs(1, 2, 1, 5, 7, 3, value_size)]

    def attend(*tensors):
        return gather(*tensors, window_size=3, recent=1, block_size=4)

    assert torch.autograd.gradcheck(attend, tensors, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, tensors)


def test_training_needs_little_memory_beside_inputs_and_results():
    shape = Shape(8192, 512, backward=True)
    tensors = inputs_of(shape, "cpu", torch.float32)
    query, key, value, gate = (t.nbytes for t in tensors)
    results = 3 * query + key + value + gate  # output, its gradient, and the gradients of the inputs

    def train():
        backward_of(gather(*tensors, window_size=shape.window), tensors)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train()
        assert peak_bytes(train) - results <= 1.5 * (key + value)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("needed", [(0,), (1, 2), (3,)])
def test_gradients_of_some_arguments(needed):
    tensors = inputs(1, 4, 2, 45, 129, 16)
    want = with_gradients(dense_dynamic_mask_attention, tensors, window_size=20)
    leaves = [t.requires_grad_(n in needed) for n, t in enumerate(tensors)]
    output = gather(*leaves, window_size=20)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(output, [leaves[n] for n in needed], cotangent)
    for n, a in zip(needed, got, strict=True):
        torch.testing.assert_close(a, want[n + 1], atol=1e-12, rtol=1e-12)


def test_a_score_mod_sees_original_positions_and_heads_and_its_captures_are_trained():
    tensors = inputs(2, 4, 2, 45, 129, 16)
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    score_mod = alibi_score_mod(slopes)
    got = with_gradients(gather, tensors, slopes, window_size=20, score_mod=score_mod)
    want = with_gradients(dense_dynamic_mask_attention, tensors, slopes, window_size=20, score_mod=score_mod)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_query_that_sees_nothing_gives_zero_and_gradient_zero():
    tensors = inputs(1, 2, 1, 8, 8, 4)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    output, dq, dk, dv, dg = with_gradients(gather, tensors, window_size=2, key_padding_mask=mask)
    for tensor in (output[:, :, :3], dq[:, :, :3], dk[:, :, :3], dv[:, :, :3], dg[:, :, :3]):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert output[:, :, 3:].abs().min() > 0
    everything_masked = with_gradients(gather, tensors, window_size=2, key_padding_mask=torch.zeros_like(mask))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in everything_masked)


@pytest.mark.usefixtures("path")
def test_a_nan_gate_shows():
    query, key, value, gate = inputs(1, 1, 1, 8, 8, 4)
    gate[..., 3] = torch.nan
    output = gather(query, key, value, gate, window_size=2)
    assert output[0, 0, 3:].isnan().all()
    assert not output[0, 0, :3].isnan().any()


def test_attention_to_pieces_is_attention_to_keys():
    """At the places of a packing in several periods, as the flex lowering assumes."""
    tensors = inputs(1, 2, 1, 64, 64, 8)
    query, key, value, gate = tensors
    lifespans = flexdma.causal_top_w(gate, 9)
    layout = flexdma.packed_layout(64, 64, 9)
    assert layout.periods > 2
    order, birth, death = (t[0, 0] for t in flexdma.pack(lifespans, layout, queries=64)[:3])
    i = torch.arange(64)[:, None]
    scores = query @ key[:, :, order].mT / 8**0.5 + gate[..., order]
    scores = scores.masked_fill(~((i >= birth) & (i < death)), -torch.inf)
    want = dense_dynamic_mask_attention(*tensors, window_size=9)
    torch.testing.assert_close(scores.softmax(-1) @ value[:, :, order], want, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(dtype):
    tensors = inputs(1, 4, 2, 129, 129, 64, dtype=dtype)
    exact = with_gradients(dense_dynamic_mask_attention, [t.double() for t in tensors], window_size=20)
    plain = with_gradients(dense_dynamic_mask_attention, tensors, window_size=20)
    got = with_gradients(gather, tensors, window_size=20)
    for name, a, b, c in zip(("output", "query", "key", "value", "gate"), got, plain, exact, strict=True):
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max()
        assert error <= allowed, f"{name}: {error} > {allowed}"
    inference = (gather(*tensors, window_size=20).double() - exact[0]).abs().max()
    assert inference <= 2 * (plain[0].double() - exact[0]).abs().max()


@pytest.mark.usefixtures("path")
def test_bfloat16_gates_are_ranked_and_added_in_float32():
    query, key, value, gate = inputs(1, 2, 1, 40, 40, 8, dtype=torch.float32)
    rounded = gate.bfloat16()
    got = gather(query, key, value, rounded, window_size=5)
    torch.testing.assert_close(got, gather(query, key, value, rounded.float(), window_size=5), atol=0, rtol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [1e4, 1e9])
def test_the_size_of_the_gates_costs_no_precision(size):
    tensors = inputs(1, 2, 1, 100, 100, 16, dtype=torch.float32)
    small = [t.double() for t in tensors]
    large = [*tensors[:3], small[3] + size]
    want = dense_dynamic_mask_attention(*small, window_size=20)
    got = gather(*large, window_size=20)
    assert (got - want).abs().max() < 2e-6


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("outlier", [-1e9, torch.finfo(torch.float32).min, 1e9])
def test_an_outlier_that_is_not_seen_costs_the_others_nothing(outlier):
    """A key hidden by padding, by another document, or by its rank."""
    tensors = inputs(1, 2, 1, 100, 100, 16, dtype=torch.float32)
    tensors[3][..., 10] = outlier
    masks: list[dict[str, Any]] = [
        {"key_padding_mask": torch.arange(100)[None] > 20},
        {"document_ids": (torch.arange(100)[None] > 20).long()},
        {} if outlier < 0 else {"key_padding_mask": torch.arange(100)[None] != 10},
    ]
    for options in masks:
        got = gather(*tensors, window_size=16, **options)[:, :, 40:]
        want = dense_dynamic_mask_attention(*[t.double() for t in tensors], window_size=16, **options)[:, :, 40:]
        assert (got - want).abs().max() < 3e-6


@pytest.mark.parametrize(
    "options", [{"selection": "threshold", "window_size": None}, {"selection": "global", "window_size": 3}]
)
def test_a_recent_key_of_the_best_gate_that_leaves_costs_the_others_nothing(options):
    query, key, value, gate = inputs(1, 1, 1, 40, 40, 8, dtype=torch.float32)
    gate = gate.double() - 1e6
    gate[..., 0], gate[..., -3:] = -1.0, 0.0 if options["selection"] == "global" else -1e6
    want = dense_dynamic_mask_attention(query.double(), key.double(), value.double(), gate, recent=5, **options)
    got = flexdma.dynamic_mask_attention(query, key, value, gate, recent=5, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    if options["selection"] == "threshold":
        got, _ = flexdma.dynamic_mask_attention(query, key, value, gate, recent=5, return_state=True, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_score_mod_may_look_up_a_table_of_positions():
    tensors = inputs(1, 2, 1, 100, 100, 16)
    table = torch.randn(100, 100, dtype=torch.float64)
    assert_same(gather, tensors, tolerance=1e-12, window_size=16, score_mod=lambda s, b, h, i, j: s + table[i, j])


def test_a_score_mod_may_hide_whole_rows():
    tensors = inputs(1, 2, 1, 20, 20, 8)

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx < 3, -torch.inf, score)

    assert_same(gather, tensors, tolerance=1e-12, window_size=6, score_mod=score_mod)


@pytest.mark.usefixtures("path")
def test_keys_that_are_not_seen_may_hold_anything():
    tensors = inputs(1, 2, 1, 60, 60, 8)
    mask = torch.arange(60)[None] >= 10
    want = gather(*tensors, window_size=6, key_padding_mask=mask)
    tensors[1][:, :, :10] = torch.nan
    assert torch.equal(gather(*tensors, window_size=6, key_padding_mask=mask), want)


def test_blocks_are_large_where_few_keys_are_born():
    gate = torch.randn(1, 1, 65536)
    assert fused_cut.block_size_for(flexdma.causal_top_w(gate, 1024), 65536, 1024) == fused_cut.LARGE_BLOCK
    early = flexdma.causal_top_w(gate[..., :8192], 1024)  # w (1 + ln(N / w)) births: 394 in a large block
    assert fused_cut.block_size_for(early, 8192, 1024) == fused_cut.BLOCK_SIZE
    rising = torch.arange(65536.0).view(1, 1, -1)
    assert fused_cut.block_size_for(flexdma.causal_top_w(rising, 1024), 65536, 1024) == fused_cut.BLOCK_SIZE
    assert fused_cut.block_size_for(flexdma.causal_top_w(gate, 1024), 1000, 1024) == fused_cut.BLOCK_SIZE
    # Where one document is much longer than the others, most queries see few keys.
    documents = torch.cat([torch.zeros(1, 8192), torch.arange(1, 57345).view(1, -1) // 512], -1).long()
    packed = flexdma.above_threshold(torch.ones(1, 1, 65536), document_ids=documents)
    assert fused_cut.block_size_for(packed, 65536, 8192) == fused_cut.BLOCK_SIZE


def test_blocks_are_small_where_most_keys_are_born():
    window = flexdma.causal_top_w(
        torch.zeros(1, 1, 2048), 256
    )  # equal gates: the last 256 keys, each query sees a new one
    assert fused_cut.block_size_for(window, 2048, 256) == fused_cut.SMALL_BLOCK
    assert fused_cut.block_size_for(window, 512, 256) == fused_cut.SMALL_BLOCK
    wide = flexdma.causal_top_w(torch.zeros(1, 1, 2048), 1024)
    assert fused_cut.block_size_for(wide, 512, 1024) == fused_cut.BLOCK_SIZE
    # No key is born at the last 512 queries.
    late = flexdma.causal_top_w(torch.cat([torch.ones(1, 1, 1536), torch.zeros(1, 1, 512)], -1), 256)
    assert fused_cut.block_size_for(late, 512, 256) == fused_cut.BLOCK_SIZE


def test_gradients_of_gates_that_outweigh_all_others():
    """Softmaxes are 1 for one key; the gradients of scores are differences of equal numbers, multiplied by large gates."""
    tensors = inputs(1, 4, 2, 60, 60, 16, dtype=torch.float32)

    def by_exponents(attend, *tensors):
        return attend(*tensors[:3], (4 * tensors[3] + 6).exp(), window_size=8)

    got = with_gradients(partial(by_exponents, gather), tensors)
    want = with_gradients(partial(by_exponents, dense_dynamic_mask_attention), [t.double() for t in tensors])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
