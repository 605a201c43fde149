"""The processes of one training, as torchrun starts them: how the work is divided, their meshes, their parts of a batch.

A rank has three numbers, of --fsdp, --context-parallel and --tensor-parallel; the last runs fastest, as it communicates most.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from flexdma.tools.byte_models.model import ModelSizes
from flexdma.tools.demo.training import Hyperparameters, Share
from flexdma.tools.refusal import RefusedError


@dataclass(frozen=True)
class Division:
    """The number of parts in each way; their product is the number of processes."""

    fsdp: int
    context: int
    tensor: int

    @property
    def ranks(self) -> int:
        """How many processes."""
        return self.fsdp * self.context * self.tensor


def is_divided(options: argparse.Namespace) -> bool:
    """Whether torchrun started this process, or an option asks for several."""
    return "WORLD_SIZE" in os.environ or division_of(options).ranks > 1


def division_of(options: argparse.Namespace) -> Division:
    """The division that the options ask for."""
    return Division(options.fsdp, options.context_parallel, options.tensor_parallel)


def check_division(options: argparse.Namespace) -> None:
    """Raise RefusedError unless there are as many processes, and every size can be divided."""
    division, sizes = division_of(options), ModelSizes()
    asked = f"--fsdp {division.fsdp} x --context-parallel {division.context} x --tensor-parallel {division.tensor}"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != division.ranks:
        raise RefusedError(
            f"{asked}: expected as many processes as the product, got {processes}; "
            f"start them by torchrun --nproc-per-node {division.ranks} -m flexdma demo ..."
        )
    if Hyperparameters.batch % division.fsdp:
        raise RefusedError(f"--fsdp: expected a divisor of the batch of {Hyperparameters.batch}, got {division.fsdp}")
    if sizes.kv_heads % division.tensor:
        raise RefusedError(
            f"--tensor-parallel: expected a divisor of the {sizes.kv_heads} KV heads, got {division.tensor}"
        )
    if options.context % (division.context * division.tensor):
        parts = f"--context-parallel {division.context} x --tensor-parallel {division.tensor}"
        raise RefusedError(f"--context: expected a multiple of {parts}, got {options.context}")


class Ranks(Share):
    """The process among those of a division, and its part of a batch.

    data: the mesh over which parameters are sharded and gradients averaged, fsdp x context ranks.
    context, tensor: the meshes of a sequence, and of the heads of a layer; None where there is one part.
    """

    def __init__(self, division: Division, device: torch.device, timeout: timedelta) -> None:
        kind, self.division, self.device = device.type, division, device
        parts = init_device_mesh(
            kind, (division.fsdp * division.context, division.tensor), mesh_dim_names=("data", "tensor")
        )
        ways = init_device_mesh(
            kind, (division.fsdp, division.context, division.tensor), mesh_dim_names=("fsdp", "context", "tensor")
        )
        # The groups of a mesh have torch's default, 30 minutes, not the timeout of the group that they are made from.
        for mesh in (parts, ways):
            for group in mesh.get_all_groups():
                _set_pg_timeout(timeout, group)
        self.data: DeviceMesh = parts["data"]
        self.tensor = parts["tensor"] if division.tensor > 1 else None
        self.context = ways["context"] if division.context > 1 else None
        self.rank = dist.get_rank()
        self.row_part, self.token_part = ways.get_local_rank("fsdp"), ways.get_local_rank("context")

    def rows(self, windows: Tensor) -> Tensor:
        """The sequences of windows [n, context + 1] that this rank trains on; fsdp divides n."""
        return windows.chunk(self.division.fsdp)[self.row_part]

    def tokens(self, windows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Input and target bytes at the positions of this rank, and the first position."""
        length = (windows.shape[1] - 1) // self.division.context
        first = self.token_part * length
        here = windows[:, first : first + length + 1]
        return here[:, :-1], here[:, 1:], first

    def mean(self, loss: Tensor) -> float:
        """The mean of a loss over all ranks; the same bits on each."""
        total = loss.double()
        dist.all_reduce(total)
        return total.item() / self.division.ranks


@contextmanager
def joined(division: Division, device: str, timeout: float) -> Iterator[Ranks]:
    """Join the group that torchrun describes, unless the process is in one.

    timeout: seconds that a rank waits for others.  Then its call raises, it ends, and torchrun ends all.
    """
    limit = timedelta(seconds=timeout)
    place = torch.device(device)
    if place.type != "cpu":
        place = torch.device(place.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(place.index)
    begins = not dist.is_initialized()
    if begins:
        dist.init_process_group(timeout=limit)
    with warnings.catch_warnings():
        if dist.get_rank():
            # Rank 0 shows the same ones.
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield Ranks(division, place, limit)
        finally:
            logging.disable(logging.NOTSET)
    if begins:
        # Not after an error: other ranks may be waiting, and this one has to end.
        dist.destroy_process_group()
