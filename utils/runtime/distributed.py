"""Start-up under torchrun or alone, and what ranks say to each other."""

from __future__ import annotations

import inspect
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from utils.runtime.process import die_with_parent, keep_freed_memory

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, on every rank."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks of each of some numbers that the host knows. No device waits for it."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def all_gather_object(self, thing: Any) -> list:
        """Something small from each rank, on every rank."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    def deal(self, work: Sequence[int]) -> Sequence[int]:
        """This rank's share of what is to be done, as even as can be. No rank begins before all have listed the same
        work."""
        self.barrier()
        return work[self.rank :: self.world]

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """DDP without a broadcast of buffers at each forward: no buffer here ever changes."""
    # torch 2.15 renames the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # 1×1 convolutions report their gradients' strides differently from DDP's buckets; nothing is slower for it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    options = {name: False, "gradient_as_bucket_view": True}  # the second: gradients stand in memory once, not twice
    return DistributedDataParallel(module, **options)  # type: ignore[arg-type]


def shard(
    model: nn.Module, units: Iterable[nn.Module], dtype: torch.dtype, methods: Sequence[str] = (), trained: bool = True
) -> None:
    """FSDP2 in place: every rank keeps its share of each unit, in fp32, and gathers a unit when it runs, in `dtype`.

    Gradients are summed over the ranks in fp32. What lies in no unit is gathered in fp32, and by default stays so until
    the backward pass: a model that is not `trained` has none. `methods` are those, beside `forward`, by which the model
    is called.
    """
    # A second to import, for those who shard only.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # the residual stream stays as it is
    if dtype != torch.float32:
        policy = replace(policy, param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in units:
        fully_shard(unit, mp_policy=policy)
    fully_shard(model, reshard_after_forward=None if trained else True)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """True for a rank's share of a larger tensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose shares, if it is sharded, are collected on every rank's device. Every rank must take part."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(tree: Any, keep: bool) -> Any:
    """A copy of a nest of tensors as it is now, whole and on the CPU; nothing of it on ranks that do not `keep` it.

    Every rank must take part when some of it is sharded.
    """

    def copy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        collected = full_tensor(x.detach())
        return collected.to("cpu", copy=True) if keep else None

    return tree_map(copy, tree)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor, if `like` is sharded; else the tensor as it is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def settle(device: torch.device) -> torch.device:
    """Settings of this process for work on a device. Returns the device."""
    keep_freed_memory()
    if device.type == "cuda":
        # cuDNN plans a kernel for each shape, and drawn schedules have thousands: flash and the others have one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def alone() -> Ranks:
    """One process, on its GPU or CPU, whatever the environment says of others."""
    return Ranks(0, 1, settle(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launch() -> None:
    """Raises ValueError when the environment describes a process among others, but not wholly or wrongly."""
    env = os.environ
    if "RANK" not in env and "LOCAL_RANK" not in env:
        return
    absent = [name for name in LAUNCHER if not env.get(name)]
    if absent:
        there = ", ".join(name for name in (*LAUNCHER, "LOCAL_RANK") if env.get(name))
        raise ValueError(f"{', '.join(absent)} missing beside {there}: start with torchrun or a script, or unset these")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not env.get(name, "0").isdecimal():
            raise ValueError(f"{name} must be a whole number, got {env[name]!r}")
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise ValueError(f"RANK {env['RANK']} is not below WORLD_SIZE {env['WORLD_SIZE']}")
    if not 0 < int(env["MASTER_PORT"]) < 2**16:
        raise ValueError(f"MASTER_PORT must be between 1 and 65535, got {env['MASTER_PORT']}")


@contextmanager
def ranks(timeout: timedelta = timedelta(minutes=30)) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, or run alone."""
    check_launch()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    settle(device)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    die_with_parent()  # a launcher that is killed takes its ranks along
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the ranks cannot meet at {where} (MASTER_ADDR:MASTER_PORT): {first}") from None
    except RuntimeError as error:  # gloo, which all ranks' numbers go over, found no network interface
        if "gloo" not in str(error).lower():
            raise
        wanted, names = os.environ.get("GLOO_SOCKET_IFNAME"), ", ".join(name for _, name in socket.if_nameindex())
        tried = f"named {wanted}" if wanted else f"with the address of this host, {socket.gethostname()}"
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"no network interface {tried}: set GLOO_SOCKET_IFNAME to one of {names} ({first})") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
