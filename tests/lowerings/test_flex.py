"""The flex lowering on a CPU: compiled forward through Inductor's C++ kernel, and the same code uncompiled with gradients.

Uncompiled FlexAttention has gradients on a CPU once its device check is removed.  On CUDA Triton kernels are generated from
the same graph.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import flexdma
from flexdma.lowerings import flex
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.score_mods import alibi_score_mod, softcap_score_mod
from tests.comparison import assert_same, inputs
from tests.lowerings.uncompiled_flex import flex_with_gradients
from tests.test_operator import VARIANTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def attend(*tensors, **options):
    """The operator by the flex lowering, which compiles in every eager call."""
    return flexdma.dynamic_mask_attention(*tensors, lowering="flex", **options)


@pytest.mark.parametrize("queries", [129, 45])
@pytest.mark.parametrize("name", VARIANTS)
def test_uncompiled_with_gradients_equals_the_specification(name, queries):
    tensors = inputs(2, 4, 2, queries, 129, 16)
    # This lowering subtracts gates in float32; the rest of this test is in float64.
    assert_same(flex_with_gradients, tensors, tolerance=1e-6, **{"window_size": 20, **VARIANTS[name]})


def test_uncompiled_float64_gates_carry_their_low_part():
    tensors = inputs(1, 2, 1, 100, 100, 16)
    large = [*tensors[:3], tensors[3] + 1e9]
    got = flex_with_gradients(*large, window_size=20)
    want = dense_dynamic_mask_attention(*tensors, window_size=20)
    assert (got - want).abs().max() < 1e-6


def test_new_gates_do_not_recompile_and_new_sizes_equal_the_specification():
    """One compilation per shape and window on a CPU, and no eager FlexAttention."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(flex.flex_attend, fullgraph=True, backend=counter)
    cases = [((2, 4, 2, 129, 129, 16), 20)] * 3 + [((1, 2, 2, 427, 1025, 32), 30)]
    for n, (shape, window) in enumerate(cases):
        query, key, value, gate = inputs(*shape, dtype=torch.float32, seed=n)
        with torch.no_grad():
            got = compiled(
                query, key, value, gate, flexdma.causal_top_w(gate, window), in_order=True, ranked=True, best_stays=True,
                capacity=window, scale=0.25, score_mod=None, block_size=(128, 32), kernel_options=None,
                needs_gradient=False, sink_logits=None,
            )  # fmt: skip
            exact = [t.double() for t in (query, key, value, gate)]
            want = dense_dynamic_mask_attention(*exact, window_size=window, scale=0.25)
        assert (got - want).abs().max() < 5e-6
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("dtype", "query_heads", "heads", "size", "value_size"),
    [
        pytest.param(torch.float32, 2, 2, 80, 48, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 4, 1, 64, 64, marks=pytest.mark.slow),
        pytest.param(torch.float16, 6, 2, 16, 256, marks=pytest.mark.slow),
    ],
)
def test_compiled_dtypes_heads_and_sizes(dtype, query_heads, heads, size, value_size):
    tensors = inputs(1, query_heads, heads, 200, 200, size, value_size, dtype=dtype)
    with torch.no_grad():
        exact = dense_dynamic_mask_attention(*[t.double() for t in tensors], window_size=30)
        plain = dense_dynamic_mask_attention(*tensors, window_size=30)
        got = attend(*tensors, window_size=30)
    assert got.dtype == dtype
    # float32: Inductor's exp has errors up to 20 units in the last place, so the plain implementation gives no tolerance.
    allowed = 5e-6 if dtype == torch.float32 else 2 * (plain.double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= allowed


def test_compiled_options_in_one_kernel():
    """Padding, documents, sinks, recent, a score_mod with captures, fewer queries than keys, float64 gates."""
    tensors = inputs(2, 4, 2, 77, 129, 16, dtype=torch.float32)
    tensors[3] = tensors[3].double() + 1e6
    slopes, cap = torch.rand(4), softcap_score_mod(3.0)
    alibi = alibi_score_mod(slopes)
    assert_same(
        attend,
        tensors,
        tolerance=1e-5,
        gradients=False,
        dense_options={"score_mod": lambda s, *i: cap(alibi_score_mod(slopes.double())(s, *i), *i)},
        score_mod=lambda s, *i: cap(alibi(s, *i), *i),
        window_size=20,
        **VARIANTS["documents"],
        key_padding_mask=VARIANTS["left padding"]["key_padding_mask"],
    )


def test_a_query_that_sees_nothing_gives_zero():
    tensors = inputs(1, 2, 1, 300, 300, 16, dtype=torch.float32)
    mask = (torch.arange(300) >= 200)[None]
    with torch.no_grad():
        output = attend(*tensors, window_size=20, key_padding_mask=mask)
    assert torch.equal(output[:, :, :200], torch.zeros(1, 2, 200, 16))
    assert output[:, :, 200:].abs().amax(-1).min() > 0


@pytest.mark.parametrize("which", ["gate", "key", "query"])
def test_nan_shows(which):
    tensors = inputs(1, 2, 1, 300, 300, 16, dtype=torch.float32)
    tensors[3][..., 100] = 3.0
    tensors[["query", "key", "value", "gate"].index(which)][:, :, 100] = torch.nan
    mask = (torch.arange(300) >= 50)[None]
    with torch.no_grad():
        output = attend(*tensors, window_size=20, key_padding_mask=mask)
        want = dense_dynamic_mask_attention(*tensors, window_size=20, key_padding_mask=mask)
    assert want.isnan().any()
    assert torch.equal(output.isnan(), want.isnan())


def test_parameters_may_require_gradients_under_no_grad():
    tensors = [t.requires_grad_() for t in inputs(1, 2, 1, 300, 300, 16, dtype=torch.float32)]
    with torch.no_grad():
        got = attend(*tensors, window_size=20)
        want = dense_dynamic_mask_attention(*tensors, window_size=20)
    torch.testing.assert_close(got, want, atol=5e-6, rtol=0)


def test_gradients_on_a_cpu_are_refused_by_name():
    tensors = [t.requires_grad_() for t in inputs(1, 1, 1, 8, 8, 16, dtype=torch.float32)]
    with pytest.raises(ValueError, match="lowering: 'flex' has no backward on a CPU; expected 'gather' or 'dense'"):
        attend(*tensors, window_size=2)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_what_a_score_mod_captures_are_refused_by_name(compiled):
    tensors, slopes = inputs(1, 1, 1, 8, 8, 16, dtype=torch.float32), torch.ones(1, requires_grad=True)

    def call(*tensors):
        return attend(*tensors, window_size=2, score_mod=alibi_score_mod(slopes))

    if compiled:
        call = torch.compile(call, backend="eager")
    with pytest.raises(Exception, match="lowering: 'flex' has no backward on a CPU; expected 'gather' or 'dense'"):
        call(*tensors)
    with torch.no_grad():
        assert (
            not flexdma.dynamic_mask_attention(*tensors, window_size=2, score_mod=alibi_score_mod(slopes)).isnan().any()
        )


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match=r"lowering: 'flex' computes in .*, got torch"):
        attend(*inputs(1, 1, 1, 8, 8, 16), window_size=2)


def test_uncompiled_outliers_cost_the_others_nothing():
    tensors = inputs(1, 2, 1, 100, 100, 16, dtype=torch.float32)
    tensors[3][..., 10], tensors[3][..., 50] = 1e9, -1e9
    ids = (torch.arange(100)[None] > 20).long()
    got = flex_with_gradients(*tensors, window_size=16, document_ids=ids)[:, :, 21:]
    want = dense_dynamic_mask_attention(*[t.double() for t in tensors], window_size=16, document_ids=ids)[:, :, 21:]
    assert (got - want).abs().max() < 3e-6
