"""Calls over ranks that differ, have no meaning, or lose a rank end with an error on every rank."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flexdma.distributed import context_parallel_dynamic_mask_attention
from tests.comparison import inputs
from tests.distributed.processes import mesh_of

WORLD = 4


def differ(change):
    """The error of each rank where rank 2 makes the call with a change."""
    mesh = mesh_of(WORLD)
    rank = mesh.get_local_rank()
    shape: dict[str, Any] = {
        "batch": 1,
        "query_heads": 4,
        "heads": 2,
        "queries": 10 + rank,
        "keys": 10 + rank,
        "size": 8,
    }
    options: dict[str, Any] = {"window_size": 4}
    if rank == 2:
        shape |= {name: value for name, value in change.items() if name in ("batch", "heads", "size", "dtype")}
        options |= {name: value for name, value in change.items() if name not in shape}
    with pytest.raises(ValueError, match="expected the same on every rank") as error:
        context_parallel_dynamic_mask_attention(*inputs(**shape), mesh=mesh, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "name", "there", "others"),
    [
        ({"window_size": 5}, "window_size", "5", "4 to 5 on all ranks"),
        ({"window_size": [4, 5]}, "window_size", "(4, 5)", "another value on some rank"),
        ({"recent": 1}, "recent", "1", "0 to 1 on all ranks"),
        ({"selection": "threshold"}, "selection", "'threshold'", "another value on some rank"),
        ({"scale": 0.5}, "scale", "0.5", "another value on some rank"),
        ({"batch": 2}, "key.shape[0]", "2", "1 to 2 on all ranks"),
        ({"heads": 1}, "key.shape[1]", "1", "1 to 2 on all ranks"),
        ({"size": 16}, "key.shape[3]", "16", "8 to 16 on all ranks"),
        ({"dtype": torch.float32}, "key.dtype", "torch.float32", "another value on some rank"),
        (
            {"document_ids": torch.zeros(1, 12, dtype=torch.long)},
            "document_ids is None",
            "False",
            "another value on some rank",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_calls_that_differ_between_ranks_are_refused(four, change, name, there, others):
    messages = four.run(differ, change)
    assert all(message.startswith(f"{name}: expected the same on every rank of the mesh, got ") for message in messages)
    assert messages[2].endswith(f"got {there} on this rank, {others}")
    assert all(message.endswith(f" on this rank, {others}") for message in messages)


def refused(call):
    mesh: Any = init_device_mesh("cpu", (2, 2) if call == "two dimensions" else (WORLD,))
    tensors = inputs(1, 2, 1, 10, 10, 4)
    if call == "not a mesh":
        mesh = torch.distributed.group.WORLD
    if call == "DTensor":
        tensors[1] = distribute_tensor(tensors[1], mesh, [Shard(2)])
    changes: dict[str, dict[str, Any]] = {
        "unbounded": {"window_size": None, "selection": "threshold"},
        "global": {"selection": "global"},
    }
    if call == "fewer queries":
        tensors[0] = tensors[0][:, :, 1:]
    options = {"window_size": 4, "mesh": mesh} | changes.get(call, {})
    attend: Callable[..., Tensor] = partial(context_parallel_dynamic_mask_attention, **options)
    if call == "torch.func":
        attend = torch.func.vmap(attend)
        tensors = [tensor[None] for tensor in tensors]
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        attend(*tensors)
    return str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("two dimensions", "mesh: expected one dimension, as mesh['cp'] has, got 2"),
        ("not a mesh", "mesh: expected a torch.distributed.device_mesh.DeviceMesh, got ProcessGroup"),
        ("DTensor", "key: expected the part of this rank, as from to_local(), got a DTensor"),
        (
            "unbounded",
            "window_size: expected an int or one per gate head over several ranks, which it bounds, got None",
        ),
        (
            "global",
            "selection: expected one of ('causal', 'threshold', 'sliding', 'full') over several ranks, got 'global'",
        ),
        ("torch.func", "torch.func: expected a call outside of its transformations, as they send no messages"),
        ("fewer queries", "query: expected 10 positions as key has, got 9"),
    ],
)
def test_calls_without_a_meaning_are_refused(four, call, message):
    assert four.run(refused, call) == [message] * WORLD


def call_from_outside():
    mesh = mesh_of(WORLD - 1)
    if mesh.get_coordinate() is not None:
        return ""
    with pytest.raises(ValueError, match="mesh") as error:
        context_parallel_dynamic_mask_attention(*inputs(1, 2, 1, 10, 10, 4), window_size=4, mesh=mesh)
    return str(error.value)


def test_a_rank_outside_the_mesh_is_refused(four):
    assert four.run(call_from_outside)[-1] == "mesh: expected this rank in the mesh, got a mesh of other ranks"


def call_without_the_last_rank(end):
    """The error of each other rank.  The last one ends its process, or never calls and stays."""
    group = torch.distributed.new_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    if mesh.get_local_rank() == WORLD - 1:
        return os._exit(1) if end else ""
    with pytest.raises(RuntimeError) as error:
        context_parallel_dynamic_mask_attention(*inputs(1, 2, 1, 10, 10, 4), window_size=4, mesh=mesh)
    return str(error.value)


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(four):
    *messages, _ = four.run(call_without_the_last_rank, False)
    assert all("imed out" in message for message in messages)


def test_a_rank_that_dies_ends_the_others(four):
    for connection in four.connections:
        connection.send((call_without_the_last_rank, (True,)))
    answers = [connection.recv() for connection in four.connections[:-1]]
    four.stop()
    assert all(failure == "" and message for failure, message in answers)  # each raised
