"""Mixers: none reads the future, bounded ones see as many keys as they state, and gates of blocks learn from attention."""

import pytest
import torch
from torch import nn

from flexdma.tools.byte_models.model import rotary_embedding
from flexdma.tools.experiments.keys_seen import keys_seen, mean_keys_seen
from flexdma.tools.experiments.mixers import MIXERS, ModelSizes, make_mixer
from flexdma.tools.experiments.model import SequenceModel

SIZES = ModelSizes(width=32, heads=4, kv_heads=2, window=8)
LENGTH = 32


def _tables(size):
    cos, sin = rotary_embedding(LENGTH, size, torch.device("cpu"))
    return cos.double(), sin.double()


TABLES = _tables(SIZES.head_dim)


def _mixer(name):
    """With random gates, so that they choose."""
    if not MIXERS[name].is_installed:
        pytest.skip(f"needs {MIXERS[name].package}")
    torch.manual_seed(0)
    mixer = make_mixer(name, SIZES).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.25)
    return mixer


@pytest.mark.parametrize("name", MIXERS)
def test_no_mixer_but_the_global_one_reads_later_tokens(name):
    mixer = _mixer(name)
    hidden = torch.randn(16, LENGTH, SIZES.width, dtype=torch.double)
    first = 15  # in the middle of a block
    hidden[:, :first] = hidden[:1, :first]
    with torch.no_grad():
        output = mixer(hidden, TABLES)[:, :first]
    is_causal = torch.allclose(output, output[:1].expand_as(output), rtol=1e-9, atol=1e-12)
    assert is_causal == (name != "DMA global")


@pytest.mark.parametrize("name", MIXERS)
def test_queries_see_as_many_keys_as_the_table_states(name):
    mixer, hidden = _mixer(name), torch.randn(LENGTH, SIZES.width, dtype=torch.double)
    seen = keys_seen(mixer, hidden, TABLES, SIZES.head_dim)
    if name == "DMA threshold":
        value = hidden @ mixer.v_proj.weight.T
        gate = mixer.gate.A[:, None] * (mixer.gate.dt_proj.weight @ value.T)
        above = (gate > 0) | (torch.arange(LENGTH) == LENGTH - 1)
        assert torch.equal(seen[:, 0], above.sum(-1).repeat_interleave(2))
    else:
        assert seen.double().mean(0).max() == (SIZES.window if MIXERS[name].bounded else LENGTH)


def test_the_spans_of_moa_are_w_on_average():
    seen = keys_seen(_mixer("MoA"), torch.randn(LENGTH, SIZES.width, dtype=torch.double), TABLES, SIZES.head_dim)
    assert seen[:, 0].tolist() == [4, 4, 12, 12]


@pytest.mark.parametrize(("branch", "keys"), [(0, LENGTH), (1, 6), (2, 2)])
def test_each_branch_of_nsa_sees_its_keys(branch, keys):
    class One(nn.Module):
        def forward(self, hidden):
            open_ = torch.arange(3).repeat_interleave(SIZES.heads) == branch
            return torch.where(open_, 0.0, -torch.inf).expand(*hidden.shape[:2], -1).double()

    mixer = _mixer("NSA")
    mixer.branch_proj = One()
    seen = keys_seen(mixer, torch.randn(LENGTH, SIZES.width, dtype=torch.double), TABLES, SIZES.head_dim)
    assert seen[:, 0].tolist() == [keys] * SIZES.heads


def test_the_loss_of_blocks_trains_their_gate_alone_towards_the_attention():
    mixer, hidden = _mixer("SeerAttention"), torch.randn(1, LENGTH, SIZES.width, dtype=torch.double)
    mixer(hidden, TABLES)
    mixer.auxiliary_loss.backward()
    trained = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert trained == {"query_proj", "key_proj"}

    query, key = (torch.randn(1, heads, LENGTH, SIZES.head_dim, dtype=torch.double) for heads in (4, 2))
    shares = mixer._target(query, key)
    for row in (0, 5, LENGTH - 1):
        weights = (key[0, 1, : row + 1] @ query[0, 3, row] * SIZES.head_dim**-0.5).softmax(-1)
        largest = torch.stack([part.max() for part in weights.split(2)])
        torch.testing.assert_close(shares[0, 3, row, : len(largest)], largest / largest.sum())
        assert shares[0, 3, row, len(largest) :].count_nonzero() == 0


def test_a_model_collects_the_losses_of_its_layers():
    model = SequenceModel("SeerAttention", ModelSizes(width=16, window=8, layers=2), 5, convolution=3)
    symbols = torch.randint(5, (2, 12, 1))
    model(symbols)
    assert len(model.auxiliary_losses()) == 2
    with torch.no_grad():
        model(symbols)
    assert model.auxiliary_losses() == []
    assert 1 <= mean_keys_seen(model, symbols[:1]) <= 8


def test_doge_is_dynamic_mask_attention():
    doge, own = _mixer("Doge"), _mixer("DMA")
    weights = {name.removeprefix("attention."): tensor for name, tensor in doge.state_dict().items()}
    own.load_state_dict({f"gate.{n}" if n.split(".")[0] in ("A", "dt_proj") else n: t for n, t in weights.items()})
    for norm in (own.q_norm, own.k_norm):
        norm.eps = 1e-6
    hidden = torch.randn(2, LENGTH, SIZES.width, dtype=torch.double)
    torch.testing.assert_close(doge(hidden, TABLES), own(hidden, TABLES), rtol=1e-5, atol=1e-5)


def test_the_rotated_half_of_a_latent_mixer_has_the_tables_of_its_size():
    mixer = _mixer("MLA")
    hidden = torch.randn(1, LENGTH, SIZES.width, dtype=torch.double)
    want = super(type(mixer), mixer).forward(hidden, _tables(SIZES.head_dim // 2))
    torch.testing.assert_close(mixer(hidden, TABLES), want)
