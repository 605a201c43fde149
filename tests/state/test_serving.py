"""Continuous batching: sequences join and leave one static batch of states, and each gives the same output as alone."""

import random
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskState, dynamic_mask_attention
from tests.comparison import inputs

SLOTS = 4
OPTIONS: dict[str, Any] = {"window_size": 6, "sinks": 1, "recent": 2}


class Sequence:
    """The query, key, value and gate of a sequence, of which some are the prompt, and its outputs so far."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.prompt, self.decoded = chance.randint(1, 30), chance.randint(1, 25)
        length = self.prompt + self.decoded
        self.tensors = inputs(1, 4, 2, length, length, 4, seed=100 + number)
        self.outputs: list[torch.Tensor] = []
        self.read = 0

    def next(self, count: int) -> list[torch.Tensor]:
        self.read += count
        return [t[:, :, self.read - count : self.read] for t in self.tensors]

    @property
    def done(self) -> bool:
        return self.read == self.prompt + self.decoded


def test_sequences_join_and_leave_a_static_batch():
    chance = random.Random(0)
    sequences = [Sequence(number, chance) for number in range(17)]
    counter = CompileCounterWithBackend("aot_eager")
    step: Any = torch.compile(dynamic_mask_attention, fullgraph=True, backend=counter)
    batch = DynamicMaskState.empty(SLOTS, 2, 4, dtype=torch.float64, gate_dtype=torch.float64, **OPTIONS)
    slots: list[Sequence | None] = [None] * SLOTS
    waiting, occupancy = list(sequences), []
    idle = [torch.full((1, heads, 1, *size), torch.nan, dtype=torch.float64)
            for heads, size in ((4, (4,)), (2, (4,)), (2, (4,)), (2, ()))]  # fmt: skip
    with torch.no_grad():
        while waiting or any(slots):
            for slot in range(SLOTS):
                if slots[slot] is None and waiting and chance.random() < 0.7:
                    joined = slots[slot] = waiting.pop(0)
                    output, state = dynamic_mask_attention(*joined.next(joined.prompt), return_state=True, **OPTIONS)
                    joined.outputs.append(output)
                    batch = batch.put(torch.tensor([slot]), state)
            # An idle slot computes NaN, which reaches no sequence.
            rows = [sequence.next(1) if sequence else idle for sequence in slots]
            tensors = [torch.cat(parts) for parts in zip(*rows, strict=True)]
            output, batch = step(*tensors, state=batch, return_state=True, **OPTIONS)
            occupancy.append(sum(sequence is not None for sequence in slots))
            for slot, sequence in enumerate(slots):
                if sequence:
                    sequence.outputs.append(output[slot : slot + 1])
                    slots[slot] = None if sequence.done else sequence
    assert counter.frame_count == 1
    assert set(occupancy) >= {SLOTS, 1}  # full at times, nearly empty at the end
    for sequence in sequences:
        alone = dynamic_mask_attention(*sequence.tensors, lowering="dense", **OPTIONS)
        torch.testing.assert_close(torch.cat(sequence.outputs, 2), alone, rtol=1e-10, atol=1e-10)
