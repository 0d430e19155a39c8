"""One training over several processes, as `torchrun` starts them: each has its rows of a batch.

Every process draws the whole batch from the same seed, which is cheap beside a step, and computes
the loss of its rows; gradients are averaged. So a run sees the same data, and up to rounding has
the same losses, whatever the number of processes.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from trainer.errors import TrainerError

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Patches (B, n, n) and what the network learns of them, network units → the loss, a scalar."""

ENVIRONMENT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""What `torchrun` sets in each process."""

LAST_WORD_S = 1.0
"""How long the others wait before they end, so that the one with the message ends first."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them; alone by default.

    rank: which one this is, of `world`. device: the one it computes on.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """True in the one process that writes files, validates and shows progress."""
        return self.rank == 0

    def rows(self, whole: Tensor) -> Tensor:
        """This process's rows of a batch (B, …): every `world`-th, from `rank`.

        The first quarter of every process's rows is the first quarter of the batch.
        """
        return whole[self.rank :: self.world]

    def shared(self, network: nn.Module, loss_of: LossFunction) -> LossFunction:
        """`loss_of`, a loss of the network, with the gradients averaged over all processes."""
        if self.world == 1:
            return loss_of
        return nn.parallel.DistributedDataParallel(
            _Loss(network, loss_of), forward_sync_buffers=False
        )

    def mean(self, value: float) -> float:
        """Mean over all processes of a number each of them has."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.item() / self.world

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Team()


class _Loss(nn.Module):
    """DistributedDataParallel averages gradients of what `forward` computes: here the loss."""

    def __init__(self, network: nn.Module, loss_of: LossFunction) -> None:
        super().__init__()
        self.network = network
        self.loss_of = loss_of

    def forward(self, patch_BHW: Tensor, truth: Tensor) -> Tensor:
        return self.loss_of(patch_BHW, truth)


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team this process was started into: alone, or one of those `torchrun` started.

    device: cpu, cuda or cuda:N; in a team on cuda each process takes the one of its local rank.
    Raises TrainerError for a device torch does not have here. A fault in one process ends them
    all, and the first to have one is the only one to raise.
    """
    if not ENVIRONMENT.issubset(os.environ):
        check_device(device)
        yield Team(device=device)
        return
    store, rank, world = next(rendezvous("env://"))
    try:
        with _group(store, Team(rank, world, device)) as team:
            yield team
    except (Exception, KeyboardInterrupt) as error:
        exit_code = getattr(error, "exit_code", 2)
        if not _first(store):
            time.sleep(LAST_WORD_S)
            os._exit(exit_code)
        # The others still wait for this process, and torch would wait for them before it ends.
        atexit.register(os._exit, exit_code)
        if "by peer" in str(error):  # of gloo, "Connection closed by peer" or "reset by peer"
            raise TrainerError(
                "a process of the run was lost; the same command goes on from the last checkpoint"
            ) from error
        raise


@contextmanager
def _group(store: Store, team: Team) -> Iterator[Team]:
    """The process group of a team, gloo or nccl by its device; ended only if all is well."""
    check_device(team.device)
    device, backend = team.device, "gloo"
    if torch.device(device).type == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "nccl"
        check_device(device)
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=team.rank, world_size=team.world)
    yield Team(team.rank, team.world, device)
    distributed.destroy_process_group()


def _first(store: Store) -> bool:
    """Whether no other process has failed before; none is asked if the store went with one."""
    try:
        return store.add("faults", 1) == 1
    except distributed.DistError:
        return False


def check_device(device: str) -> None:
    """Refuse a device torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainerError(f"--device: no `{device}` here; use cpu") from error
