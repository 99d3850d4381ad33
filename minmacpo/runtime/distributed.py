"""Several processes ("ranks") under torchrun that do one run together; the only module that knows torch.distributed.

Rank 0 alone makes slices of the user's texts, writes and speaks; `Distributed.first` lets the others wait for it as long as it takes. In a
stage that uses a model all take part: `share` and `add_up` divide an optimiser step, `each` a list of forward passes.
The one process of an ordinary run is `Distributed()`, which does all by itself and imports nothing.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor, nn

from minmacpo import UserError
from minmacpo.runtime.progress import Interrupted, Signals

PATIENCE = timedelta(
    days=1
)  # of a collective: ranks are a block of samples, or a step, apart; one that ends is noticed at once


LISTEN = 0.2  # most seconds between two looks, while waiting for rank 0


class Distributed:
    """This process among `world`, and what all do together. A method that is a collective is called by all ranks or by none;
    `shards`: the blocks of a model are divided among them, so that even its forward pass is one."""

    def __init__(self, signals: Signals | None = None, rank: int = 0, world: int = 1, store=None):
        self.signals, self.rank, self.world_size, self.store = (
            signals or Signals(),
            rank,
            world,
            store,
        )
        self.is_main, self.is_sharded, self.turns = rank == 0, False, 0
        self.ranks_per_device = 1  # how many ranks have the memory of this one's device

    def connect(self, device: str, shard: bool) -> None:
        """Open the ways on which tensors go; on GPUs each rank has its own. Collective.

        Args:
            device: "cpu" or "cuda".
            shard: whether the ranks divide the weights of every base among them (parallel.shard).
        """
        if self.world_size == 1:
            return
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda":
            if local >= (found := torch.cuda.device_count()):
                raise UserError(
                    f"torchrun has started more processes than the GPUs of this machine, which are {found}"
                )
            torch.cuda.set_device(local)
        else:
            self.ranks_per_device = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        backend, self.is_sharded = (
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            shard,
        )
        known = {"store": self.store, "rank": self.rank, "world_size": self.world_size}
        torch.distributed.init_process_group(backend, timeout=PATIENCE, **known)

    def run_on_main(self, do: Callable):
        """What rank 0 gets from `do`, a value of JSON; all others wait for it. Collective."""
        if self.world_size == 1:
            return do()
        self.turns += 1
        key = f"turn {self.turns}"
        if self.is_main:
            found = do()
            self.store.set(key, json.dumps(found))
            return found
        pause = 0.001
        while not self.store.check([key]):
            if self.store.check(["said"]):
                raise UserError("another rank has failed")  # which has said why
            self.signals.check()
            time.sleep(pause := min(1.5 * pause, LISTEN))
        return json.loads(self.store.get(key))

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers. Collective, on the CPU: nobody waits for a GPU."""
        if self.world_size == 1:
            return number
        told = torch.tensor([int(number)])
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    def raise_if_stopped(self) -> None:
        """Raise Interrupted on all ranks if one of them was asked to stop. Collective."""
        if number := self.all_reduce_max(self.signals.number or 0):
            raise Interrupted(number)

    def gather(self, value) -> list:
        """The values, of JSON, of all ranks. Collective."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]))
        room = int(max(sizes))
        parts = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
        torch.distributed.all_gather(parts, nn.functional.pad(data, (0, room - len(data))))
        return [
            json.loads(part[:size].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def warn(self, text: str, log: Callable[[str], None]) -> None:
        """A line on what may be so on this rank alone: by `log`, which is silent but on rank 0, and there on stderr."""
        if self.is_main:
            log(text)
        else:
            print(f"WARNING: rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def parallel_map(self, items: Sequence, do: Callable) -> Iterator:
        """`do` of every item, in order and for all ranks; each rank does one of `world` items at a time. An item is computed
        whole by one rank, so that what comes out does not depend on their number. Collective."""
        for start in range(0, len(items), self.world_size):
            self.raise_if_stopped()
            wave = items[start : start + self.world_size]
            found = None
            if self.rank < len(wave):
                found = do(wave[self.rank])
            elif self.is_sharded:
                # Others need this rank's part of the weights in every pass, so it makes one too
                do(wave[-1])
            yield from self.gather(found)[: len(wave)]

    def split_batches(self, groups: list[list[int]]) -> list[list[int]]:
        """This rank's part of the micro-batches of a step: as many whole ones as all can have, and a part of each of the
        rest. Where models are sharded, all ranks get equally many, [] standing for a pass that does not count."""
        whole = len(groups) // self.world_size * self.world_size
        parts = [group[self.rank :: self.world_size] for group in groups[whole:]]
        return groups[:whole][self.rank :: self.world_size] + [
            part for part in parts if part or self.is_sharded
        ]

    def all_reduce_grads(self, params: Sequence[nn.Parameter], values: Tensor) -> Tensor:
        """The sum of all ranks' `values` [n]; the gradients of `params` become their sums too, in one all-reduce. Collective."""
        if self.world_size == 1:
            return values
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([part.reshape(-1) for part in (*grads, values)])
        torch.distributed.all_reduce(flat)
        *sums, total = flat.split([*(p.numel() for p in params), len(values)])
        for param, part in zip(params, sums, strict=True):
            param.grad = part.view_as(param)
        return total.to(values.dtype)

    def shard(self, model: nn.Module, whole: Sequence[nn.Parameter], device: str) -> None:
        """With `shards`: move a model from the CPU to the device, block by block; each rank keeps its part of a block, and
        fetches the rest for a pass (FSDP2). `whole`, the slot, is held by all; so is what lies outside the blocks, as losses
        use the head's weight alone. Collective."""
        if not self.is_sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh, blocks = (
            torch.distributed.init_device_mesh(device, (self.world_size,)),
            model.model["layers"],
        )
        outside = {*model.parameters()} - {*blocks.parameters()} | {*whole}
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params={*whole})
        fully_shard(
            model, mesh=mesh, ignored_params=outside
        )  # it holds nothing, and lets blocks be fetched ahead
        model.to(device)
        # A first pass in inference mode would make buffers that cannot be trained with
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))

    @contextlib.contextmanager
    def report_first_error(self) -> Iterator[None]:
        """Of whatever ends the ranks, the first one's error is told, and the others exit in silence."""
        try:
            yield
        except BaseException as error:
            if self.world_size == 1:
                raise
            with contextlib.suppress(
                RuntimeError
            ):  # the store has gone with torchrun: all may speak
                if self.store.add("said", 1) > 1:
                    code = 128 + error.number if isinstance(error, Interrupted) else 2
                    raise SystemExit(code) from None
            if lost(error):
                raise UserError(
                    "a rank has ended, or did not answer for a day; all finished work is saved. The same command line goes on from here"
                ) from None
            raise
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


SINGLE_PROCESS = Distributed()


def lost(error: BaseException) -> bool:
    """Whether the error says that another rank cannot be reached."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def launched() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    known = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if known else 1


def meet() -> Distributed:
    """The ranks that torchrun has started, met by this one; they can wait and speak, and `connect` does the rest."""
    if launched() == 1:
        return Distributed()
    from torch.distributed import PrefixStore, rendezvous

    store, rank, world = next(rendezvous("env://"))
    return Distributed(rank=rank, world=world, store=PrefixStore("minmacpo", store))
