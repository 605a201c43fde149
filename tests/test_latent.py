"""The latent layer equals its definition written out head by head, DeepSeek-V3's own, and itself in chunks and tokens."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from flexdma import DynamicMaskAttention, DynamicMaskLatentAttention
from flexdma.reference import dense_visibility
from tests.comparison import gradients_of
from tests.integrations.hf_models import causal_lm  # noqa: F401  # keeps transformers offline
from tests.test_modules import rotary

import accelerate  # isort: skip
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config  # isort: skip
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention  # isort: skip

HEADS, RANK, NOPE, ROPE, VALUE = 3, 10, 6, 4, 5
SIZES: dict[str, Any] = {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "query latent": {"q_lora_rank": 7, "rope_interleave": True, "bias": True, "scale": 0.2},
    "output gate": {"output_gate": True, "recency": "slope", "sinks": 1, "recent": 3},
    "forget": {"recency": "forget", "q_lora_rank": 7},
    "threshold": {"selection": "threshold", "form": "linear", "sinks": 1},
    "sliding": {"selection": "sliding", "sinks": 2},
    "full": {"selection": "full", "window": None},
    "threshold alone": {"selection": "threshold", "window": None, "form": "linear", "recent": 3},
}
MASK = torch.ones(2, 30, dtype=torch.bool)
MASK[0, 3:5] = MASK[0, 20:23] = MASK[1, 29] = False
MASKS: dict[str, Any] = {
    "key_padding_mask": MASK,
    "document_ids": torch.stack([torch.arange(30) // 11, torch.arange(30) // 23]),
}


def made(window: int | None = 6, **options):
    torch.manual_seed(0)
    layer = DynamicMaskLatentAttention(24, HEADS, window, **SIZES, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.double()


def tokens(length=30):
    return torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normed(numbers, norm):
    return numbers / (numbers.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def turned(numbers, tables, interleave):
    """Pairs of numbers as complex ones, which the embedding multiplies; in the order of the halves."""
    cos, sin = (table[:, : ROPE // 2].double() for table in tables)
    first, second = (numbers[..., ::2], numbers[..., 1::2]) if interleave else numbers.chunk(2, -1)
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat([product.real, product.imag], -1)


def slow(layer, hidden, tables, key_padding_mask=None, document_ids=None):
    """The layer by its formulas, one head at a time, with a dense mask."""
    policy, weights = layer.policy, dict(layer.named_parameters())

    def linear(numbers, name):
        return nn.functional.linear(numbers, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    if layer.has_query_latent:
        query = linear(normed(linear(hidden, "q_a_proj"), layer.q_a_layernorm), "q_b_proj")
    else:
        query = linear(hidden, "q_proj")
    compressed = linear(hidden, "kv_a_proj_with_mqa")
    latent = normed(compressed[..., :RANK], layer.kv_a_layernorm)
    key_rope = turned(compressed[..., RANK:], tables, layer.rope_interleave)
    gate = torch.zeros(2, 1, hidden.shape[1], dtype=torch.float64)
    if layer.gate is not None:
        gate = layer.gate(latent[:, None], key_padding_mask=key_padding_mask).double()
    seen = dense_visibility(
        gate, window_size=policy.window_size, selection=policy.kind, sinks=policy.sinks, recent=policy.recent,
        key_padding_mask=key_padding_mask, document_ids=document_ids,
    )[:, 0]  # fmt: skip
    outputs = []
    for head in range(HEADS):
        own = query.unflatten(-1, (HEADS, NOPE + ROPE))[:, :, head]
        up = layer.kv_b_proj.weight.unflatten(0, (HEADS, NOPE + VALUE))[head]
        key, value = latent @ up[:NOPE].T, latent @ up[NOPE:].T
        rotated = turned(own[..., NOPE:], tables, layer.rope_interleave)
        scores = (own[..., :NOPE] @ key.mT + rotated @ key_rope.mT) * layer.scale + gate
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        outputs.append(torch.where(seen.any(-1, keepdim=True), scores.softmax(-1) @ value, 0.0))
    joined = torch.cat(outputs, -1)
    if layer.g_proj is not None:
        joined = joined / (1 + torch.exp(-linear(hidden, "g_proj")))
    return linear(joined, "o_proj")


def with_gradients(layer, call, hidden):
    """Output, and the gradients of the hidden states and of all parameters."""
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output = call(hidden)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum().backward()
    return [output.detach(), hidden.grad, *gradients_of(layer.parameters())]


def assert_close(got, want, tolerance=1e-5):
    """Gates are float32, and their rounding depends on how many tokens a call has."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def in_chunks(layer, hidden, tables, sizes, masks=None, state=None, **options):
    """The outputs of consecutive chunks of these sizes, and the state after them."""
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        given = {name: mask[:, part] for name, mask in (masks or {}).items()}
        output, state = layer(
            hidden[:, part], [table[part] for table in tables], state=state, return_state=True, **given, **options
        )
        outputs.append(output)
        start += size
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_layer_is_its_formulas_with_all_gradients(name, masked):
    layer, tables, masks = made(**VARIANTS[name]), rotary(30, ROPE), MASKS if masked else {}
    want = with_gradients(layer, lambda hidden: slow(layer, hidden, tables, **masks), tokens())
    assert_close(with_gradients(layer, lambda hidden: layer(hidden, tables, **masks), tokens()), want)
    # Token by token the absorbed form is the same function, and so are its gradients.
    sizes = [11, 1, 1, 1, 9, 1, 6]
    assert_close(
        with_gradients(layer, lambda hidden: in_chunks(layer, hidden, tables, sizes, masks)[0], tokens()), want
    )


def test_checkpointed_and_called_again():
    layer, tables = made(**VARIANTS["output gate"]), rotary(30, ROPE)
    want = with_gradients(layer, lambda hidden: layer(hidden, tables), tokens())
    for _ in range(2):
        again = with_gradients(layer, lambda hidden: checkpoint(layer, hidden, tables, use_reentrant=False), tokens())
        assert_close(again, want, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_any_chunks_are_one_pass_and_the_absorbed_form_is_the_expanded_one(name):
    layer, tables, hidden = made(**VARIANTS[name]), rotary(30, ROPE), tokens()
    want = slow(layer, hidden, tables, **MASKS)
    for donate in (False, True):
        got, state = in_chunks(layer, hidden, tables, [1] * 30, MASKS, layer.empty_state(2), donate=donate)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    split, after = in_chunks(layer, hidden, tables, [13, 1, 1, 15], MASKS)
    torch.testing.assert_close(split, want, atol=1e-6, rtol=1e-6)
    assert [state.position[state.position >= 0].sort().values.tolist(), state.length.tolist()] == [
        after.position[after.position >= 0].sort().values.tolist(),
        after.length.tolist(),
    ]
    # The same gates, so the forms differ by float64's rounding only.
    expanding = made(**VARIANTS[name], lowering="gather")
    tokens_of = (hidden[:, -1:], [table[-1:] for table in tables])
    _, state = in_chunks(layer, hidden[:, :-1], tables, [29])
    forms = [each(*tokens_of, state=state, return_state=True)[0] for each in (layer, expanding)]
    torch.testing.assert_close(*forms, atol=1e-13, rtol=1e-13)


@torch.no_grad()
def test_score_mods_get_positions_and_query_heads():
    layer, tables, hidden = made(), rotary(30, ROPE), tokens()

    def score_mod(score, b, h, i, j):
        return score * (1 + h) + 0.1 * b - 0.05 * (i - j)

    want = layer(hidden, tables, score_mod=score_mod)
    assert (want - layer(hidden, tables)).abs().max() > 0.01
    got, _ = in_chunks(layer, hidden, tables, [14, 1, 1, 13, 1], score_mod=score_mod)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["query latent", "forget", "sliding"])
def test_packed_sequences_are_each_alone(name):
    layer, hidden = made(**VARIANTS[name]), tokens()[:1]
    output, states = layer(hidden, cu_seqlens=torch.tensor([0, 12, 30]), return_state=True)
    for row, part in enumerate((slice(0, 12), slice(12, 30))):
        alone, state = layer(hidden[:, part], return_state=True)
        torch.testing.assert_close(output[:, part], alone, atol=1e-6, rtol=1e-6)
        after, want = states.reorder(torch.tensor([row])), layer(hidden[:, :1], state=state, return_state=True)[0]
        got, _ = layer(hidden[:, :1], state=after, return_state=True)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("interleave", "rank"), [(True, 7), (False, None)])
def test_deepseek_v3_with_the_same_weights(interleave, rank):
    """A window wider than the text and a new gate of the form "exp", which is constant, are DeepSeek's own full attention."""
    config = DeepseekV3Config(
        hidden_size=24, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK, q_lora_rank=rank,
        qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE, rope_interleave=interleave,
        attn_implementation="eager",
    )  # fmt: skip
    theirs, hidden = DeepseekV3Attention(config, 0), tokens().float()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    layer = DynamicMaskLatentAttention(24, HEADS, 64, form="exp", q_lora_rank=rank, rope_interleave=interleave, **SIZES)
    missing, unexpected = layer.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["gate.A", "gate.dt_proj.weight"]
    assert unexpected == []
    tables = rotary(30, ROPE)
    causal = torch.full((30, 30), -torch.inf).triu(1)[None, None]
    want, _ = theirs(hidden, (tables[0][None], tables[1][None]), causal)
    torch.testing.assert_close(layer(hidden, tables), want, atol=1e-5, rtol=1e-5)
    got, _ = in_chunks(layer, hidden, tables, [17, *[1] * 13])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_state_holds_each_latent_and_rotated_key_once():
    layer = DynamicMaskLatentAttention(64, 16, 100, sinks=4, recent=8, **SIZES)
    state = layer.empty_state(2, torch.bfloat16)
    assert state.key.nbytes + state.value.nbytes == 2 * 112 * (RANK + ROPE) * 2
    assert state.gate.nbytes + state.position.nbytes == 2 * 112 * 12
    heads = DynamicMaskAttention(64, 16, 16, NOPE + ROPE, 100, sinks=4, recent=8).empty_state(2, torch.bfloat16)
    assert heads.key.nbytes == 2 * 112 * 16 * (NOPE + ROPE) * 2


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@torch.no_grad()
def test_autocast():
    layer, tables, hidden = made(**VARIANTS["query latent"], window=40).float(), rotary(30, ROPE), tokens().float()
    want = layer(hidden, tables)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = layer(hidden, tables)
        split, state = in_chunks(layer, hidden, tables, [17, *[1] * 13])
    assert whole.dtype == split.dtype == state.value.dtype == torch.bfloat16
    for got in (whole, split):
        assert (got - want).abs().max() < 0.03 * want.abs().max()


@torch.no_grad()
def test_kept_up_projections_are_not_stale():
    layer, hidden, rows = made(), tokens(), []
    layer.kv_b_proj.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[-2]))
    state = layer(hidden[:, :9], return_state=True)[1]

    def decoded():
        rows.clear()
        return layer(hidden[:, 9:10], state=state, return_state=True)[0], list(rows)

    want, called = decoded()
    assert called == [RANK]
    layer.absorb()
    got, called = decoded()
    assert called == []
    assert torch.equal(got, want)
    assert "_up" not in layer.state_dict()
    layer.kv_b_proj.weight.mul_(2.0)
    changed, called = decoded()
    assert called == [RANK]
    assert not torch.allclose(changed, want)
    layer.absorb()
    with torch.enable_grad():
        layer(hidden[:, 9:10], state=state, return_state=True)[0].sum().backward()
    assert layer.kv_b_proj.weight.grad is not None


@torch.no_grad()
def test_kept_up_projections_are_dropped_with_their_weights():
    """A parameter that is freed may leave its id and address to the next."""
    layer, hidden = made(), tokens()
    state = layer(hidden[:, :9], return_state=True)[1]
    for number in range(20):
        layer.absorb()
        weight = torch.randn_like(layer.kv_b_proj.weight)
        if number % 2:
            layer.kv_b_proj.weight.data = weight
        else:
            layer.kv_b_proj.load_state_dict({"weight": weight}, assign=True)
        got = layer(hidden[:, 9:10], state=state, return_state=True)[0]
        assert layer._up is None
        assert torch.equal(got, layer(hidden[:, 9:10], state=state, return_state=True)[0])


@torch.no_grad()
def test_offloaded_weights():
    layer, hidden = made(**VARIANTS["query latent"]), tokens()
    want = layer(hidden)
    layer = accelerate.cpu_offload(layer, execution_device="cpu")
    assert layer.kv_b_proj.weight.is_meta
    state = layer.empty_state(2, torch.float64, "cpu")
    parts = []
    for part in hidden.split([11, 1, 17, 1], 1):
        output, state = layer(part, state=state, return_state=True)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_trains_at_changing_lengths(backend):
    layer = made(output_gate=True).float()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (30, 17, 23):
        call = {"hidden_states": tokens(length).float(), "position_embeddings": rotary(length, ROPE)}
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            output = function(**call, key_padding_mask=MASK[:, :length])
            output.square().sum().backward()
            results.append([output.detach(), *gradients_of(layer.parameters())])
        got, want = results
        assert_close(got, want, 1e-4)
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_decodes(backend):
    layer, hidden, tables = made(**VARIANTS["query latent"]).float(), tokens().float(), rotary(30, ROPE)
    layer.absorb()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    first, state = in_chunks(layer, hidden, tables, [26])
    got, _ = in_chunks(compiled, hidden[:, 26:], [table[26:] for table in tables], [1] * 4, state=state)
    want = layer(hidden, tables)
    torch.testing.assert_close(torch.cat([first, got], 1), want, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kv_lora_rank: expected at least 1, got 0"):
        DynamicMaskLatentAttention(24, HEADS, 6, kv_lora_rank=0)
    with pytest.raises(ValueError, match="window_size: expected one int per"):
        DynamicMaskLatentAttention(24, HEADS, [6, 7, 8], **SIZES)  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match="recency: expected None with selection='sliding', which has no gate, got"):
        made(selection="sliding", recency="slope")
    layer = made()
    with pytest.raises(ValueError, match=r"hidden_states: expected \[B, N, 24\], got \[2, 5, 16\]"):
        layer(torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match=r"position_embeddings, cos: expected \[5, 4\], got \[5, 10\]"):
        layer(tokens(5), rotary(5, NOPE + ROPE))
    with pytest.raises(ValueError, match="document_ids: expected None with cu_seqlens, got a Tensor"):
        layer(tokens(5)[:1], cu_seqlens=torch.tensor([0, 5]), document_ids=torch.zeros(1, 5).long())
    state = DynamicMaskAttention(24, 2, 1, ROPE, 6).empty_state(2, torch.float64)
    with pytest.raises(ValueError, match="state: expected value"):
        layer(tokens(5), state=state, return_state=True)


def test_no_tokens_are_refused_by_name():
    with pytest.raises(ValueError, match="hidden_states: expected at least 1 position, got 0"):
        DynamicMaskLatentAttention(24, 2, 4, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)(
            torch.randn(1, 0, 24)
        )
