"""Measure the table of intervals.md: two intervals per key beside one, forward and training, interleaved in one process.

python docs/systems/measure_intervals.py [--length 16384] [--window 1024] [--rounds 5]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flexdma import Lifespans, lifespan_attention
from flexdma.policies import dms_training_lifespans, fsa_lifespans


def least_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least process time of each call; the calls of a round follow each other."""
    seconds = dict.fromkeys(calls, float("inf"))
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_:  # the first round touches memory for the first time
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def main() -> None:
    """Print one row per mask and phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("length", 16384), ("window", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    length, window = arguments.length, arguments.window
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 64, generator=generator) for heads in (2, 1, 1))
    alpha = torch.randn(1, 1, length, generator=generator)
    position = torch.arange(length).expand(1, 1, length)

    def causal(alpha: Tensor) -> tuple[object, object]:
        return Lifespans(position, torch.full_like(position, length)), logsigmoid(-alpha)

    def one_window(alpha: Tensor) -> tuple[object, object]:
        return Lifespans(position, position + window), alpha

    def two_bands(alpha: Tensor) -> tuple[object, object]:
        return fsa_lifespans(key, window // 2, 3 * window, window // 2), alpha

    masks = {
        f"DMS training, window {window}": (causal, lambda alpha: dms_training_lifespans(alpha, window)),
        f"{window} keys": (one_window, two_bands),
    }
    for mask, forms in masks.items():
        for phase in ("forward", "forward and backward"):

            def run(form: Callable, trains: bool = phase != "forward") -> None:
                leaves = [each.detach().requires_grad_(trains) for each in (query, key, value, alpha)]
                lifespans, bias = form(leaves[3])
                output = lifespan_attention(*leaves[:3], lifespans, bias=bias)
                if trains:
                    output.square().sum().backward()

            calls = {name: (lambda form=form: run(form)) for name, form in zip(("one", "two"), forms, strict=True)}
            seconds = least_seconds(calls, arguments.rounds)
            print(f"{mask}, {phase}: one {seconds['one']:.3f} s, two {seconds['two']:.3f} s", flush=True)


if __name__ == "__main__":
    main()
