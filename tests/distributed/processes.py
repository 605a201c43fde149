"""Groups of processes on this machine that run the cases of a test module, over gloo on loopback.

    def test_ranks_know_their_number(four):  # of conftest.py; two is there too
        assert four.run(my_rank) == [0, 1, 2, 3]  # my_rank is a function at the top of a module

Each rank starts once for a module, forked from a server that has imported torch.  A rank that raises, dies or takes longer
than the limit ends the whole group, and `run` raises; the next `run` starts another group.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

# Seconds.  A case takes a few of them; the limits are for cases that hang.
CASE_LIMIT = 240
COLLECTIVE_LIMIT = 120


@cache
def mesh_of(size: int) -> DeviceMesh:
    """On a rank: the mesh of the first `size` ranks."""
    return DeviceMesh("cpu", list(range(size)))


class RankError(AssertionError):
    """A rank raised, died or took too long."""


class Ranks:
    """`world` processes, each a rank of one gloo group."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.stop()

    def run(self, case: Callable[..., Any], *arguments: Any, limit: float = CASE_LIMIT) -> list[Any]:
        """The values that case(*arguments) returns on each rank.  Arguments and values are pickled."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((case, arguments))
        waiting, values = dict(zip(self.connections, range(self.world), strict=True)), {}
        end = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise RankError(f"ranks {sorted(waiting.values())} took longer than {limit} s")
            for connection in [each for each in waiting if each in ready]:
                rank = waiting.pop(connection)
                try:
                    failure, values[rank] = connection.recv()
                except EOFError:
                    failure = "the process ended"
                if failure:
                    self.stop()
                    raise RankError(f"rank {rank}: {failure}")
        return [values[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "torch._dynamo",
                "torch.distributed.checkpoint.state_dict",
                "torch.distributed.fsdp",
                "flexdma.distributed",
            ]
        )
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=COLLECTIVE_LIMIT)
        )
        self.store = store  # kept alive: it is the server
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store.port, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def stop(self) -> None:
        """End the processes."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []


def _serve(rank: int, world: int, port: int, connection: Connection) -> None:
    """Run the cases that arrive, until the connection closes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=COLLECTIVE_LIMIT)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    while True:
        try:
            case, arguments = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = ("", case(*arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        try:
            connection.send(answer)
        except BrokenPipeError:  # another rank failed, and the group is being ended
            return
