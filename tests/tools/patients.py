"""Functions with one problem each, for tests of the doctor.  `healthy_call` is also an entry point."""

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import flexdma


def prints(x):
    y = x.sin()
    print("between two graphs")  # the graph break
    return y.cos()


def prints_in_a_loop(x):
    for _ in range(2):
        x = x.sin()
        print("nothing of this function is compiled")
    return x


def scales(x, factor):
    return x * factor


class CountsItsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, x):
        self.step += 1
        return x * self.step


@torch.compiler.disable
def attends_uncompiled(x):
    return flex_attention(x, x, x)  # the eager call


def attends_behind_a_break(x):
    return attends_uncompiled(x) + 1


def attends(x):
    return flex_attention(x, x, x)


def layer():
    return flexdma.DynamicMaskAttention(32, 4, 2, 8, 16, recency="slope")


def healthy_call():
    return layer(), [(torch.randn(1, 40, 32),)]


def broken_call():
    return prints, [(torch.randn(4),)]


def two_calls():
    return [(torch.randn(4), 1), (torch.randn(4), 2)]


def no_call():
    return torch.randn(4)


def fails():
    raise RuntimeError("no data")
