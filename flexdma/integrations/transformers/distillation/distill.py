"""The loop of a distillation."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler
from transformers.utils import logging

from flexdma import checks
from flexdma.annealing import check_share
from flexdma.integrations.transformers.distillation.distiller import Distiller, Recipe
from flexdma.integrations.transformers.distillation.record import Distillation
from flexdma.mixed_precision import without_autocast

Batch = Tensor | Mapping[str, Tensor]
# The largest norm of the gradient.
CLIP = 1.0


def distill(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    steps: int | None = None,
    gates: bool = True,
    lora: Any = None,
    merge: bool = True,
    anneal: float = 0.5,
    far: int = 128,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    warmup: float = 0.1,
    seed: int = 0,
) -> Distillation:
    """Train the gates of a converted model, and adapters, to the predictions that its weights make with full attention.

    Changes the model in place.  All other weights stay as they are.

    model: a causal language model of `calibrate` or `convert_to_dma` (with form "linear" or "identity"), on any device, in
        any dtype; without dropout or learned sinks.
    batches: token ids [B, N] int64, or mappings with them in "input_ids"; without padding and labels, longer than windows.
    steps: of the optimizer, one batch each; None = len(batches).  `batches` starts again where it ends before.
    gates: train what a gate reads from a value; A, slopes and biases stay.  A gate learns to predict

            1e-4 + max of P_hij over queries i >= j + far and the heads h of its group

        of the full model as exp(gate / A), up to a factor, as in `calibrate`.  Heads with A = 0 get A = 2 ** -20, which
        ranks keys and leaves logits alone.
    lora: train LoRA adapters (needs peft), which learn by KL(full model || this model) to use the keys that are kept:
        a rank, for all projections of the attention layers, or a LoraConfig.  None = no adapters.
    merge: add the adapters to the weights at the end.  False = leave the model inside the PeftModel that the result has,
        whose `save_pretrained` saves adapters and gates.
    anneal: share of the steps in which windows shrink from N to their sizes, along half a cosine, in 8 sizes.
    lr, gate_lr: highest learning rates of AdamW for adapters and gates, for short runs of small models; `warmup` is the share
        of steps in which they grow, and half a cosine brings them to 0.  Gradients are clipped to norm 1.
    seed: of the adapters' initial weights.

    Returns the losses of each step.  At the end, also after an exception or Ctrl-C, the model has its final windows, and
    adapters are merged if they are to be; `config.flexdma["distilled"]` is True.
    Raises TypeError, ValueError or ImportError naming what cannot be distilled; FloatingPointError for a loss that is not
    finite.
    A step is a forward pass of the full model and a training step of flexdma, or without adapters a forward pass of it.
    Memory: as training with flexdma, logits of 256 positions and hidden states of the full model; no N x N tensor.
    Autocast and activation checkpointing work as in other training.
    """
    steps = _checked_steps(steps, batches)
    check_share("warmup", warmup)
    distiller = Distiller(model, Recipe(gates, lora, merge, anneal, far, seed))
    try:
        optimizer = torch.optim.AdamW(distiller.parameter_groups(lr, gate_lr), weight_decay=0.0)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
        distiller.trained.train()
        with logging.tqdm(total=steps, desc="distill") as bar:
            for step, batch in enumerate(_repeated(batches, steps)):
                distiller.annealing.start_step(step, steps)
                loss = distiller.loss(batch)
                with without_autocast(loss.device):
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(distiller.trained.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                # Under autocast around this call the next step would compute with copies of the old adapters.
                torch.clear_autocast_cache()
                bar.update()
                bar.set_postfix(distiller.record.latest)
    finally:
        distiller.end()
    return distiller.record


def _checked_steps(steps: int | None, batches: Iterable[Batch]) -> int:
    if steps is None:
        if not isinstance(batches, Sized):
            raise TypeError(
                f"steps: expected a number for batches without a length, got None for {type(batches).__name__}"
            )
        steps = len(batches)
    checks.positive_int("steps", steps)
    return steps


def _repeated(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """`steps` batches.  Raises ValueError where they end and cannot be read again."""
    given = 0
    while given < steps:
        before = given
        for batch in batches:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise ValueError(f"batches: expected {steps} batches, or some that can be read again, got {given}")
