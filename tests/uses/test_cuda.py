"""The flex lowering on a GPU, forward and backward; skipped where there is none."""

import pytest
import torch

import flexdma
from flexdma.lowerings.gate_gradient import ROUTES, gate_gradient_route
from flexdma.packing import packed_layout
from flexdma.reference import dense_attention_mass, dense_dynamic_mask_attention
from flexdma.score_mods import alibi_score_mod
from tests.comparison import inputs
from tests.test_logit_bias import CASES as BIASED
from tests.test_logit_bias import falling_or_rising, with_bias
from tests.test_operator import VARIANTS
from tests.uses.gpu_warnings import TORCHS_OWN_ON_A_GPU

pytestmark = [
    pytest.mark.gpu,
    *map(pytest.mark.filterwarnings, TORCHS_OWN_ON_A_GPU),
]


def on_gpu(options):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def compare(tensors, **options):
    """The error of output and gradients is at most twice that of the plain implementation in the same dtype."""
    tensors, options = [t.cuda() for t in tensors], on_gpu(options)
    exact = with_gradients_on_gpu(dense_dynamic_mask_attention, [t.double() for t in tensors], **options)
    plain = with_gradients_on_gpu(dense_dynamic_mask_attention, tensors, **options)
    got = with_gradients_on_gpu(flexdma.dynamic_mask_attention, tensors, lowering="flex", **options)
    for name, a, b, c in zip(("output", "query", "key", "value", "gate"), got, plain, exact, strict=True):
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + 2e-6 * c.abs().max() + 2e-5
        assert error <= allowed, f"{name}: {error} > {allowed}"


def with_gradients_on_gpu(function, tensors, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "softcap"])
def test_every_option_with_gradients(name):
    compare(inputs(2, 4, 2, 129, 129, 16, dtype=torch.float32), **{"window_size": 20, **VARIANTS[name]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
def test_dtypes_and_sizes(dtype, size):
    compare(inputs(1, 8, 2, 1025, 1025, size, dtype=dtype), window_size=128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_with_a_large_common_part(dtype):
    tensors = inputs(1, 8, 2, 1025, 1025, 64, dtype=dtype)
    tensors[2] += 4
    compare(tensors, window_size=128)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("group", [2, 8])
def test_lengths_that_blocks_divide(route, group):
    """The rows of a group's heads follow each other; several periods of keys."""
    with gate_gradient_route(route):
        compare(inputs(1, 8, 8 // group, 1024, 1024, 64, dtype=torch.float32), window_size=64)


@pytest.mark.parametrize("name", ["causal", "padding and documents", "threshold, window and learned sinks"])
def test_a_bias_beside_the_gate(name):
    """Float32, as 2e-4 of the largest number: outputs and all gradients, the bias's too."""
    *tensors, gate = inputs(2, 4, 2, 45, 60, 16, dtype=torch.float32)
    bias = (falling_or_rising(2, 60, [-0.5, 0.25]) + torch.randn(2, 2, 60)).float()
    tensors, options = [t.cuda() for t in (*tensors, gate, bias)], on_gpu(BIASED[name])
    exact = with_gradients_on_gpu(with_bias(dense_dynamic_mask_attention), [t.double() for t in tensors], **options)
    got = with_gradients_on_gpu(with_bias(flexdma.dynamic_mask_attention), tensors, **options)
    for a, b in zip(got, exact, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()


def test_several_periods_and_documents():
    """Keys that reach several periods, and documents that end inside one."""
    document_ids = (torch.arange(4097)[None] >= torch.tensor([700, 3001]).view(2, 1)).sum(0, keepdim=True)
    assert packed_layout(4097, 4097, 256, block_size=(128, 128), group=2).periods > 1
    compare(inputs(1, 4, 2, 4097, 4097, 64, dtype=torch.float32), window_size=256, document_ids=document_ids)


def test_keys_in_their_own_order_in_many_blocks():
    """A window, which packing does not help; torch 2.11 splits sums over so many blocks."""
    query, key, value, _ = (t.cuda() for t in inputs(1, 4, 2, 32768, 32768, 64, dtype=torch.bfloat16))
    birth = torch.arange(32768, dtype=torch.int32, device="cuda").expand(1, 1, -1)
    window = flexdma.Lifespans(birth, birth + 256)
    with torch.no_grad():
        got, want = (
            flexdma.lifespan_attention(query, key, value, window, lowering=lowering) for lowering in ("flex", "gather")
        )
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_a_batch_with_one_kv_head():
    """In inference and in training; with lists of blocks of one head Inductor may choose strides that the kernel ignores."""
    tensors = inputs(3, 4, 1, 300, 700, 64, dtype=torch.float32)
    compare(tensors, window_size=40)
    tensors = [t.cuda() for t in tensors]
    with torch.no_grad():
        got = flexdma.dynamic_mask_attention(*tensors, window_size=40)
        want = dense_dynamic_mask_attention(*[t.double() for t in tensors], window_size=40)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 9, 33])
def test_few_queries(queries):
    compare(inputs(1, 4, 2, queries, 300, 64, dtype=torch.float32), window_size=40)


def test_float64_gates_and_a_score_mod_with_fewer_queries():
    tensors = inputs(1, 4, 2, 77, 300, 64, dtype=torch.float32)
    tensors[3] = tensors[3].double() + 1e6
    compare(tensors, window_size=40, score_mod=alibi_score_mod(torch.rand(4, device="cuda")))


def test_nothing_waits_for_the_device():
    tensors = [t.cuda().requires_grad_() for t in inputs(1, 4, 2, 512, 512, 64, dtype=torch.float32)]

    def step():
        flexdma.dynamic_mask_attention(*tensors, window_size=64, sinks=2, recent=8).sum().backward()

    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_gates_and_lengths_do_not_recompile_forever():
    """One compilation each: the first length, other lengths, whole last periods, lengths that Inductor sorts differently."""
    torch._dynamo.utils.counters.clear()
    for length in (512, 512, 640, 768, 896, 2000, 3000, 4000, 5000):
        tensors = [t.cuda() for t in inputs(1, 4, 2, length, length, 64, dtype=torch.float32, seed=length)]
        got = flexdma.dynamic_mask_attention(*tensors, window_size=64)
        want = dense_dynamic_mask_attention(*[t.double() for t in tensors], window_size=64)
        assert (got - want).abs().max() < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_other_lengths_heads_and_windows_in_training():
    """From the second length on shapes are dynamic, and the gate's gradient uses another route."""
    for length, heads, window in ((512, 2, 64), (640, 2, 64), (700, 4, 64), (701, 4, 100), (300, 4, 100)):
        compare(inputs(1, 4, heads, length, length, 64, dtype=torch.float32), window_size=window)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_of_the_gates_gradient(route):
    with gate_gradient_route(route):
        compare(inputs(1, 8, 2, 1025, 1025, 64, dtype=torch.float32), window_size=128, document_ids=documents_of(1025))
        compare(inputs(1, 8, 2, 1025, 1025, 64, dtype=torch.float32), window_size=128, score_mod=lambda s, *_: s / 2)


def documents_of(length):
    return (torch.arange(length)[None] > length // 3).long()


def test_deterministic_algorithms_give_the_same_gradients_every_time():
    tensors = [t.cuda() for t in inputs(1, 8, 2, 1024, 1024, 64, dtype=torch.bfloat16)]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients_on_gpu(flexdma.dynamic_mask_attention, tensors, window_size=128) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_a_cuda_graph_replays_forward_and_backward():
    def step(query, key, value, gate):
        return flexdma.dynamic_mask_attention(query, key, value, gate, window_size=64, sinks=2)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        tensors = [t.cuda() for t in inputs(1, 4, 2, 512, 512, 64, dtype=torch.float32, seed=seed)]
        got = [t.clone() for t in with_gradients_on_gpu(compiled, tensors)]
        for a, b in zip(got, with_gradients_on_gpu(step, tensors), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_cuda_graph_replays_a_layer():
    layer = flexdma.DynamicMaskAttention(128, 4, 2, 64, 64, recency="slope").cuda()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            hidden = torch.randn(1, 512, 128, device="cuda")
            torch.testing.assert_close(compiled(hidden).clone(), layer(hidden), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_mass(dtype, reduction):
    query, key, _, gate = (t.cuda() for t in inputs(2, 4, 2, 300, 400, 64, dtype=dtype))
    for lifespans in (None, flexdma.causal_top_w(gate, 40, recent=5)):
        for ages in (None, [(0, 20), (128, None)]):
            got = flexdma.attention_mass(query, key, lifespans, reduction=reduction, ages=ages)
            want = dense_attention_mass(query.double(), key.double(), lifespans, reduction=reduction, ages=ages)
            torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)
