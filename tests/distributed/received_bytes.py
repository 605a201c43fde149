"""The bytes that a rank receives in collectives."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = torch.ops._c10d_functional


class ReceivedBytes(TorchDispatchMode):
    """Adds up what this rank receives from others while the mode is active; `count` is the sum.

    An all-reduce counts the bytes of its result once.  Raises for other collectives of torch.distributed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("_c10d_functional", "c10d"):
            self.count += _received(func, args)
        return func(*args, **(kwargs or {}))


def _received(func: Any, args: tuple[Any, ...]) -> int:
    if func in (COLLECTIVES.wait_tensor.default, COLLECTIVES._wrap_tensor_autograd.default):
        return 0
    tensor = args[0]
    if func is COLLECTIVES.all_reduce.default:
        return tensor.nbytes
    if func is COLLECTIVES.all_gather_into_tensor.default:
        return tensor.nbytes * (args[1] - 1)
    if func is COLLECTIVES.all_to_all_single.default:
        rank = torch.distributed.get_rank(distributed_c10d._resolve_process_group(args[3]))
        others = sum(size for source, size in enumerate(args[1]) if source != rank)
        return others * tensor.element_size() * prod(tensor.shape[1:])
    raise NotImplementedError(f"bytes of {func}")
