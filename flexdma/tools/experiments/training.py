"""One run: a mixer trained on a task with one learning rate and one seed."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexdma.annealing import annealed_window
from flexdma.attention_layer import AttentionLayer
from flexdma.tools.experiments.finite_json import with_numbers, with_words
from flexdma.tools.experiments.keys_seen import mean_keys_seen
from flexdma.tools.experiments.mixers import ModelSizes
from flexdma.tools.experiments.model import SequenceModel
from flexdma.tools.experiments.probes import Probe
from flexdma.tools.experiments.tasks import IGNORED, Batch, Task

SOLVED = 0.95


@dataclass(frozen=True)
class Schedule:
    """How every mixer is trained: AdamW, warm-up over a tenth of the steps, cosine decay.

    every: steps between two evaluations, each on `held_out` sequences, with the final windows.
    anneal: share of the steps in which the windows of mixers that choose keys by gates shrink (`flexdma.annealed_window`).
    """

    steps: int = 1000
    batch: int = 32
    every: int = 100
    held_out: int = 256
    weight_decay: float = 0.1
    anneal: float = 0.0


@dataclass
class Outcome:
    """What a run found.

    steps: of the evaluations.  near, far: the accuracy at each, over questions whose answer is within reach of a window, and
        beyond it (`reach`).  loss: of the evaluations, nats per question.  probed: what the probe measured at each.
    parameters: of the model.  seconds: of training, on a CPU processor time, which other work does not change.
    keys: the mean number of keys that a query sees in a head, after training (`mean_keys_seen`); NaN = not counted.
    """

    mixer: str
    rate: float
    seed: int
    parameters: int
    steps: list[int] = field(default_factory=list)
    near: list[float] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    probed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    keys: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """The contents of its JSON."""
        return with_words(asdict(self))

    @classmethod
    def from_dict(cls, contents: dict[str, Any]) -> "Outcome":
        """The inverse of `as_dict`."""
        return cls(**with_numbers(contents))

    def solved_at(self) -> int | None:
        """The first step of an evaluation with far >= SOLVED; None for never."""
        return next((step for step, far in zip(self.steps, self.far, strict=True) if far >= SOLVED), None)


def reach(sizes: ModelSizes) -> int:
    """The distance that layers of windows bridge: L (w - 1)."""
    return sizes.layers * (sizes.window - 1)


def train(
    mixer: str, task: Task, sizes: ModelSizes, schedule: Schedule, *, rate: float, seed: int,
    device: str = "cpu", probe: Probe | None = None, watch: Callable[[int, Outcome], None] = lambda step, outcome: None,
) -> Outcome:  # fmt: skip
    """Train one model and evaluate it on the way.

    probe: measures the model at every evaluation.  watch: called after every step.
    The batches depend on the seed alone, so all mixers and rates of a seed see the same.
    """
    model = SequenceModel(mixer, sizes, task.symbols, convolution=task.convolution, rotary=task.rotary, seed=seed).to(
        device
    )
    outcome = Outcome(mixer, rate, seed, sum(p.numel() for p in model.parameters()))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.95),
    )  # fmt: skip
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, schedule.steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    held_out = task.held_out(schedule.held_out)
    choosing = [layer for layer in model.mixers if isinstance(layer, AttentionLayer) and layer.policy.by_gate]
    windows = [(layer, layer.window_size) for layer in choosing if isinstance(layer.window_size, int)]
    clock = time.process_time if device == "cpu" else time.perf_counter
    for step in range(1, schedule.steps + 1):
        started = clock()
        batch = task.batch(schedule.batch, generator)
        progress = (step - 1) / schedule.steps
        for layer, window in windows:
            layer.window_size = annealed_window(window, batch.symbols.shape[1], progress, schedule.anneal)
        asked = batch.targets != IGNORED
        loss = cross_entropy(model(batch.symbols.to(device), asked.to(device)).float(), batch.targets[asked].to(device))
        loss = sum(model.auxiliary_losses(), loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        outcome.seconds += clock() - started
        if step % schedule.every == 0 or step == schedule.steps:
            for layer, window in windows:
                layer.window_size = window
            _evaluate(model, held_out, schedule.batch, reach(sizes), outcome, step, device)
            if probe is not None:
                outcome.probed.append(probe.measure(model, task, is_last=step == schedule.steps))
        if step == schedule.steps:
            outcome.keys = mean_keys_seen(model, held_out.symbols[:1].to(device))
        watch(step, outcome)
    return outcome


@torch.no_grad()
def _evaluate(
    model: SequenceModel, batch: Batch, size: int, bridged: int, outcome: Outcome, step: int, device: str
) -> None:
    asked = batch.targets != IGNORED
    rows = [
        model(symbols.to(device), at.to(device)).cpu()
        for symbols, at in zip(batch.symbols.split(size), asked.split(size), strict=True)
    ]
    logits, targets, far = torch.cat(rows).float(), batch.targets[asked], batch.distance[asked] > bridged
    right = logits.argmax(-1) == targets
    outcome.steps.append(step)
    outcome.near.append(_share(right, ~far))
    outcome.far.append(_share(right, far))
    outcome.loss.append(cross_entropy(logits, targets).item())


def _share(right: Tensor, of: Tensor) -> float:
    """The share that is right; NaN where there is none."""
    return right[of].double().mean().item()
