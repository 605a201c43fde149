"""The flex lowering in plain PyTorch, with gradients: uncompiled FlexAttention has gradients on a CPU once its device check
is removed.
"""

import contextlib
from unittest import mock

import torch.nn.attention.flex_attention as torch_flex

from flexdma import checks
from flexdma.lifespans import Selection
from flexdma.lifespans.terms import as_terms, bias_of_terms
from flexdma.lifespans.visible import most_visible
from flexdma.lowerings import flex
from flexdma.lowerings.gate_gradient import chosen_route
from flexdma.lowerings.reference_gate import added_to_logits


def flex_with_gradients(query, key, value, gate, *, window_size, selection="causal", sinks=0, recent=0, **options):
    """`dynamic_mask_attention` by the flex lowering, uncompiled, in small blocks."""
    policy = Selection.of(selection, window_size, sinks, recent, heads=key.shape[1] if gate is None else gate.shape[1])
    masks = {name: options.pop(name, None) for name in ("key_padding_mask", "document_ids")}
    lifespans = policy.lifespans(policy.gates(gate, key), **masks)
    return attend_uncompiled(
        query, key, value, gate, lifespans, in_order=True, ranked=policy.is_ranked, best_stays=policy.best_stays,
        capacity=policy.capacity or key.shape[2], **options,
    )  # fmt: skip


def lifespans_with_gradients(query, key, value, lifespans, *, bias=None, **options):
    """`lifespan_attention` by the flex lowering, uncompiled, in small blocks."""
    intervals, biases = checks.intervals(lifespans, bias, key)
    terms = as_terms(intervals, key.shape[2])
    return attend_uncompiled(
        query, key, value, None, terms, bias=bias_of_terms(biases), in_order=False, ranked=False, best_stays=False,
        capacity=max(1, most_visible(terms, query.shape[2])), **options,
    )  # fmt: skip


def attend_uncompiled(
    query, key, value, gate, lifespans, *, best_stays, bias=None, scale=None, score_mod=None, sink_logits=None, **facts
):
    """Arguments as of `flexdma.lowerings.attend.attend`."""
    captures_with_gradients = score_mod is not None or chosen_route(True, False) == "atomics"
    with gradients_on_a_cpu(traced=captures_with_gradients):
        return flex.flex_attend(
            query, key, value, added_to_logits(gate, bias), lifespans, best_stays=best_stays and bias is None,
            scale=query.shape[-1] ** -0.5 if scale is None else scale, score_mod=score_mod, block_size=(32, 16),
            kernel_options=None, needs_gradient=True, sink_logits=sink_logits, **facts,
        )  # fmt: skip


@contextlib.contextmanager
def gradients_on_a_cpu(*, traced=False):
    """Let uncompiled FlexAttention have gradients.

    traced: by Dynamo, half a second a call.  Only gradients of what a score_mod captures need it.
    """
    with contextlib.ExitStack() as stack:
        for check in ("_validate_device", "_validate_nestedness"):  # one check before torch 2.13, two since
            if hasattr(torch_flex, check):
                stack.enter_context(mock.patch.object(torch_flex, check, return_value=None))
        stack.enter_context(mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", not traced))
        yield
