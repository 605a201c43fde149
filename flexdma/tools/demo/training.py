"""Training and validation, with the same hyperparameters, schedule and batches for every kind of attention."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexdma.tools.byte_models.model import ByteModel, run_block
from flexdma.tools.demo.text import Text, training_windows

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


def train(
    model: ByteModel,
    text: Text,
    hyperparameters: Hyperparameters,
    *,
    compiled: bool,
    watchers: Sequence[Callable[[Course], None]] = (),
) -> Course:
    """Train in place.  Each watcher is called with the course after every step; its time is left out of the speed."""
    device = model.embedding.weight.device
    # Compile the block, not the model: the layers are equal, so one compilation is enough.
    block = torch.compile(run_block, fullgraph=True, dynamic=False) if compiled else run_block
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=hyperparameters.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=hyperparameters.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, hyperparameters))
    generator = torch.Generator().manual_seed(hyperparameters.seed)
    course = Course()
    for step in range(hyperparameters.steps):
        started = time.perf_counter()
        windows = training_windows(text, hyperparameters.context, hyperparameters.batch, generator).to(device)
        loss = _loss(model(windows[:, :-1], block), windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        course.losses.append(loss.item() * BITS)
        course.seconds += time.perf_counter() - started
        if step == 0:
            course.compile_seconds = course.seconds
        else:
            trained = step * hyperparameters.batch * hyperparameters.context
            course.tokens_per_second = trained / (course.seconds - course.compile_seconds)
        for watch in watchers:
            watch(course)
    return course


def learning_rate_factor(step: int, hyperparameters: Hyperparameters) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    warmup = min(1.0, (step + 1) / min(hyperparameters.warmup, max(1, hyperparameters.steps // 4)))
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / hyperparameters.steps)))


@torch.no_grad()
def validate(model: ByteModel, windows: Tensor, batch: int = 8) -> float:
    """Bits per byte over windows [n, context + 1]."""
    device = model.embedding.weight.device
    losses = [_loss(model(rows[:, :-1]), rows).item() * len(rows) for rows in windows.to(device).split(batch)]
    return sum(losses) / len(windows) * BITS


def _loss(logits: Tensor, windows: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
