"""A budget that shrinks in training, from the whole sequence to its final size."""

import math

from flexdma import checks

# With the final window 8 sizes: code that is compiled for each is compiled 8 times, as often as torch does by default.
SIZES = 8


def annealed_window(window_size: int, length: int, progress: float, share: float = 0.5) -> int:
    """The window of a training step: `length` at first, `window_size` once `share` of the training is over.

    Keys that no query sees have no gradient.  While all are seen, gates learn which of them matter, and the smaller window
    then keeps those (docs/experiments.md, niah).

    window_size: w in the end, in keys.  length: of the sequences; from length <= w on the window is w.
    progress: step / steps, from 0 to 1.  share: of the training, in which windows shrink; 0 = w from the first step on.

        for step in range(steps):
            for layer in layers:  # DynamicMaskAttention
                layer.window_size = annealed_window(64, 512, step / steps)
        for layer in layers:
            layer.window_size = 64  # a share of nearly 1 ends above it

    Of a model of transformers set all by `flexdma.integrations.transformers.set_window_size`.
    Compiled code is made for one size, unless torch._dynamo.config.allow_unspec_int_on_nn_module is True.  By default torch
    compiles 8 times and then runs a function uncompiled, so set it where lengths change too, or losses without gradients.

    Returns an int.  It falls in 8 sizes, along half a cosine: slowly, then fast, then slowly.
    Raises ValueError or TypeError naming the argument.
    """
    checks.positive_int("window_size", window_size)
    checks.positive_int("length", length)
    check_share("progress", progress)
    check_share("share", share)
    if progress >= share:
        return window_size
    rest = (1 + math.cos(math.pi * int((SIZES - 1) * progress / share) / (SIZES - 1))) / 2
    return window_size + round(rest * max(length - window_size, 0))


def check_share(name: str, share: object) -> None:
    """Raise TypeError or ValueError unless it is a share of the steps."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name}: expected a Python number, a share of the steps, got {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected a share of the steps from 0 to 1, got {share!r}")
