"""Several processes ("ranks") under torchrun that do one run together.

Rank 0, the main one, alone writes and speaks; `run_on_main` lets the others wait for it. In a stage
that uses a model all take part: `split_batches` and `all_reduce_grads` divide an optimiser step,
`parallel_map` a list of forward passes. The one process of an ordinary run is `Distributed()`,
which does everything itself. No other module knows torch.distributed.
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
from minmacpo.runtime.files import to_values
from minmacpo.runtime.progress import Interrupted, Signals

# Ranks may be a shard of samples, or a step, apart. One that ends is noticed at once.
COLLECTIVE_TIMEOUT = timedelta(days=1)
LONGEST_PAUSE_S = 0.2  # between two looks, while waiting for rank 0
FAILED = "failed"  # key of the store: how many ranks have reported an error


class Distributed:
    """This process among all that do the run, and what they do together.

    A method that is called collective must be called by all ranks or by none. `is_sharded` says
    that the layers of a base are divided among the ranks; even a forward pass is collective then.
    """

    def __init__(
        self, signals: Signals | None = None, rank: int = 0, world_size: int = 1, store=None
    ):
        """Args:
        store: torch's key-value store that the ranks share; None if there is one rank.
        """
        self.signals = signals or Signals()
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self.is_main = rank == 0
        self.is_sharded = False
        self.ranks_per_device = 1  # ranks that share the memory of this one's device
        self.main_calls = 0  # of `run_on_main` so far, the same on all ranks

    def connect(self, device: str, shard: bool) -> None:
        """Open the ways on which tensors go; on GPUs each rank takes its own. Collective.

        Args:
            device: "cpu" or "cuda".
            shard: whether the ranks divide the weights of every base among them (parallel.shard).
        """
        if self.world_size == 1:
            return
        self.is_sharded = shard
        backend = "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            take_own_gpu()
        else:
            self.ranks_per_device = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        torch.distributed.init_process_group(
            backend,
            timeout=COLLECTIVE_TIMEOUT,
            store=self.store,
            rank=self.rank,
            world_size=self.world_size,
        )

    # --- Rank 0 alone

    def run_on_main(self, function: Callable):
        """What a function returns on rank 0, a value of JSON; others wait for it. Collective."""
        if self.world_size == 1:
            return function()
        self.main_calls += 1
        key = f"call {self.main_calls}"
        if self.is_main:
            result = function()
            self.store.set(key, json.dumps(result))
            return result

        pause = 0.001
        while not self.store.check([key]):
            if self.store.check([FAILED]):
                raise UserError("another rank has failed")  # which has said why
            self.signals.check()
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
            time.sleep(pause)
        return json.loads(self.store.get(key))

    def warn(self, text: str, log: Callable[[str], None]) -> None:
        """A line on what may be so on this rank alone.

        Args:
            log: where rank 0 says it; the others print it, as their logs are silent.
        """
        if self.is_main:
            log(text)
        else:
            print(f"WARNING: rank {self.rank}: {text}", file=sys.stderr, flush=True)

    # --- Numbers of all ranks

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers. Collective, on the CPU: nobody waits for a GPU."""
        if self.world_size == 1:
            return number
        largest = torch.tensor([int(number)])
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def raise_if_stopped(self) -> None:
        """Raise Interrupted on all ranks if one of them was asked to stop. Collective."""
        number = self.all_reduce_max(self.signals.number or 0)
        if number:
            raise Interrupted(number)

    def gather(self, value) -> list:
        """The values of all ranks, which JSON or `to_jsonl` can write. Collective."""
        if self.world_size == 1:
            return [value]
        # Tensors must have one size on all ranks: the longest text's
        text = json.dumps(value, default=to_values)
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]))
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        torch.distributed.all_gather(texts, nn.functional.pad(data, (0, longest - len(data))))

        values = []
        for text, size in zip(texts, sizes, strict=True):
            values.append(json.loads(text[:size].numpy().tobytes()))
        return values

    # --- Work that is divided

    def parallel_map(self, items: Sequence, function: Callable) -> Iterator:
        """What `function` returns for every item, in order and on all ranks. Collective.

        Each rank computes one of `world_size` items at a time. An item is computed whole by one
        rank, so that what comes out does not depend on their number.
        """
        for start in range(0, len(items), self.world_size):
            self.raise_if_stopped()
            wave = items[start : start + self.world_size]
            result = None
            if self.rank < len(wave):
                result = function(wave[self.rank])
            elif self.is_sharded:
                # Others need this rank's part of the weights in every pass, so it makes one too
                function(wave[-1])
            yield from self.gather(result)[: len(wave)]

    def split_batches(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """This rank's part of the micro-batches of a step.

        All ranks get equally many whole ones, and a part of each of the rest. Where models are
        sharded a part may be empty: a pass that does not count, but that all ranks make.
        """
        evenly = len(micro_batches) // self.world_size * self.world_size
        local = micro_batches[self.rank : evenly : self.world_size]
        for micro_batch in micro_batches[evenly:]:
            part = micro_batch[self.rank :: self.world_size]
            if part or self.is_sharded:
                local.append(part)
        return local

    def all_reduce_grads(self, params: Sequence[nn.Parameter], values: Tensor) -> Tensor:
        """The sum of all ranks' values (n,); gradients become their sums too. Collective.

        All goes in one message, as many small ones take longer.
        """
        if self.world_size == 1:
            return values
        parts = []
        for param in params:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            parts.append(grad.reshape(-1))
        flat = torch.cat([*parts, values])
        torch.distributed.all_reduce(flat)

        *grads, total = flat.split([*(param.numel() for param in params), len(values)])
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.view_as(param)
        return total.to(values.dtype)

    # --- Models that are divided

    def shard(self, model: nn.Module, whole: Sequence[nn.Parameter], device: str) -> None:
        """If `is_sharded`, divide a model among the ranks and move it to the device. Collective.

        Each rank keeps its part of a layer and fetches the rest for a pass (FSDP2).

        Args:
            model: on the CPU.
            whole: parameters that all ranks hold: those of the adapter. What lies outside the
                layers is held by all as well, as losses use the head's weight alone.
        """
        if not self.is_sharded:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh(device, (self.world_size,))
        layers = model.model["layers"]
        outside = set(model.parameters()) - set(layers.parameters())
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=set(whole))
        # The model itself divides nothing more; it lets layers be fetched ahead
        fully_shard(model, mesh=mesh, ignored_params=outside | set(whole))
        model.to(device)

        # A first pass in inference mode would make buffers that cannot be trained with
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))

    # --- Errors

    @contextlib.contextmanager
    def report_first_error(self) -> Iterator[None]:
        """Let the first error that ends a rank be told, and the other ranks end in silence."""
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            if not self.is_first_to_fail():
                code = 128 + error.number if isinstance(error, Interrupted) else 2
                raise SystemExit(code) from None
            if is_lost_connection(error):
                raise UserError(
                    "a rank has ended, or did not answer for a day; all finished work is saved. "
                    "The same command line goes on from here"
                ) from None
            raise
        torch.distributed.destroy_process_group()

    def is_first_to_fail(self) -> bool:
        """Whether no other rank has failed before this one."""
        try:
            return self.store.add(FAILED, 1) == 1
        except RuntimeError:  # the store has gone with torchrun: all may speak
            return True


SINGLE_PROCESS = Distributed()


def weights_are_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some parameters (see `Distributed.shard`)."""
    return any(type(param) is not nn.Parameter for param in model.parameters())


def take_own_gpu() -> None:
    """Let this process use the GPU of its number on this machine."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"torchrun has started more processes than the GPUs of this machine, which are {count}"
        )
    torch.cuda.set_device(local_rank)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank cannot be reached."""
    from torch.distributed import DistError

    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return isinstance(error, DistError) or is_of_gloo


def launched_world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return int(os.environ["WORLD_SIZE"])
    return 1


def meet() -> Distributed:
    """The ranks that torchrun has started; they can wait for each other before `connect`."""
    if launched_world_size() == 1:
        return Distributed()
    from torch.distributed import PrefixStore, rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    return Distributed(rank=rank, world_size=world_size, store=PrefixStore("minmacpo", store))
