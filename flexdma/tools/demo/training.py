"""Training and validation, with the same hyperparameters, schedule and batches for every kind of attention."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flexdma.tools.byte_models.model import run_block
from flexdma.tools.byte_models.text import Text, training_windows

BITS = 1 / math.log(2)  # nats to bits


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of every model.  All parameters have the same learning rate."""

    steps: int
    context: int
    batch: int = 4
    learning_rate: float = 3e-3
    warmup: int = 30
    weight_decay: float = 0.01
    seed: int = 0


@dataclass
class Course:
    """The course of a training.  compile_seconds: the first step, which compiles and is left out of the speed."""

    losses: list[float] = field(default_factory=list)  # bits per byte, one per step
    compile_seconds: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    # Filled in by a watcher: at some steps, the share of keys that no query sees, [layer][head].
    recorded_steps: list[int] = field(default_factory=list)
    never_visible: list[list[list[float]]] = field(default_factory=list)


class Share:
    """The part of a batch that a process computes: all of it, in a process that trains alone."""

    def rows(self, windows: Tensor) -> Tensor:
        """The sequences of windows [n, context + 1] that this process trains on."""
        return windows

    def tokens(self, windows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Of windows [n, context + 1]: input and target bytes at the positions of this process, and the first position."""
        return windows[:, :-1], windows[:, 1:], 0

    def mean(self, loss: Tensor) -> float:
        """The mean of a loss over all processes, each of which has the mean over its part."""
        return loss.item()


@dataclass
class Training:
    """All that a step of training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the batches
    course: Course = field(default_factory=Course)


class Checkpoints(Protocol):
    """Where a training is kept."""

    def load(self, training: Training) -> None:
        """Bring it to the step that was saved last, if one was."""

    def save(self, training: Training) -> None:
        """Called after every step."""


def train(
    model: nn.Module,
    text: Text,
    hyperparameters: Hyperparameters,
    *,
    compiled: bool,
    watchers: Sequence[Callable[[Course], None]] = (),
    share: Share | None = None,
    checkpoints: Checkpoints | None = None,
) -> Course:
    """Train a ByteModel in place.

    watchers: each is called with the course after every step; their time and that of checkpoints is left out of the speed.
    """
    share = share or Share()
    device = next(model.parameters()).device
    # Compile the block, not the model: the layers are equal, so one compilation is enough.
    block = torch.compile(run_block, fullgraph=True, dynamic=False) if compiled else run_block
    training = Training(
        model,
        torch.optim.AdamW(
            model.parameters(),
            lr=hyperparameters.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=hyperparameters.weight_decay,
        ),
        torch.Generator().manual_seed(hyperparameters.seed),
    )
    if checkpoints is not None:
        checkpoints.load(training)
    course, optimizer = training.course, training.optimizer
    begun = len(course.losses)
    for step in range(begun, hyperparameters.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = hyperparameters.learning_rate * learning_rate_factor(step, hyperparameters)
        windows = training_windows(text, hyperparameters.context, hyperparameters.batch, training.generator)
        tokens, targets, first = share.tokens(share.rows(windows).to(device))
        loss = _loss(model(tokens, block, first=first), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.losses.append(share.mean(loss.detach()) * BITS)
        course.seconds += time.perf_counter() - started
        if step == begun:
            course.compile_seconds = course.seconds
        else:
            trained = (step - begun) * hyperparameters.batch * hyperparameters.context
            course.tokens_per_second = trained / (course.seconds - course.compile_seconds)
        for watch in watchers:
            watch(course)
        if checkpoints is not None:
            checkpoints.save(training)
    return course


def learning_rate_factor(step: int, hyperparameters: Hyperparameters) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    warmup = min(1.0, (step + 1) / min(hyperparameters.warmup, max(1, hyperparameters.steps // 4)))
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / hyperparameters.steps)))


@torch.no_grad()
def validate(model: nn.Module, windows: Tensor, batch: int = 8, *, share: Share | None = None) -> float:
    """Bits per byte over windows [n, context + 1].  Every process computes its positions of all windows."""
    share = share or Share()
    device = next(model.parameters()).device
    total = 0.0
    for rows in windows.to(device).split(batch):
        tokens, targets, first = share.tokens(rows)
        total += share.mean(_loss(model(tokens, first=first), targets)) * len(rows)
    return total / len(windows) * BITS


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
