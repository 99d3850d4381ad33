"""Ranks for tests: as torchrun starts them, but forked after the imports, which saves time.

As under torchrun the store is the launcher's, a signal goes on to all ranks, and the first one that
fails ends the others.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.fsdp
from conftest import Keep, random_model
from torch.distributed import TCPStore

from minmacpo import UserError
from minmacpo.config.schema import Lora
from minmacpo.core.lora import attach_lora, init_adapter
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.sampling import SamplingParams, generate
from minmacpo.core.scoring import score
from minmacpo.core.sft_loss import SFTLoss
from minmacpo.core.trainer import OptimizerConfig, TrainerHooks, TrainExample, ignore, train_step
from minmacpo.core.trainer import train as train_model
from minmacpo.data.tokenizer import Tokens
from minmacpo.runtime.distributed import meet
from minmacpo.runtime.progress import Interrupted, run_main

STEPS = 10  # of a training
LAST_STEP = 7  # after which the ranks are asked to stop, where they are


def rows_of(seed: int, units: int, sides: int) -> list[TrainExample]:
    """Answers, or pairs with reference logps, of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))  # noqa: E731
    found = []
    for i in range(units):
        rows = []
        for _ in range(sides):
            length, start = number(8, 40), number(1, 7)
            ids = torch.randint(3, 61, (length,), generator=draw).tolist()
            rows.append(Tokens(ids, [place >= start for place in range(length)]))
        found.append(TrainExample(f"u{i}", tuple(rows), (-20.0, -21.0)[: 2 if sides == 2 else 0]))
    return found


def slotted(seed: int, dist):
    """A random model with a slot that does something, on these ranks."""
    model = random_model(seed)
    params = attach_lora(model, Lora(targets=("q_proj", "v_proj", "down_proj")))
    init_adapter(model, seed)
    draw = torch.Generator().manual_seed(seed)
    for param in params:
        param.data.add_(0.02 * torch.randn(param.shape, generator=draw))
    dist.shard(model, params, "cpu")
    return model, params


def together(seed: int, folder: str, name: str, kind: str, shards: bool, job):
    """What `job` makes of (dist, units, model, params, loss, hooks), all ranks doing it."""
    loss = SFTLoss() if kind == "sft" else PreferenceLoss(0.1, 0.2)
    rows_per_unit = 1 if kind == "sft" else 2
    with (dist := meet()).report_first_error():
        dist.connect("cpu", shard=shards)
        hooks = TrainerHooks(
            name="part/stage",
            seed=seed,
            max_tokens_per_batch=120,
            state_file=Path(folder, name, "state/state.safetensors"),
            log=ignore,
            should_stop=lambda: dist.all_reduce_max(dist.signals.number or 0) > 0,
            raise_if_stopped=dist.raise_if_stopped,
            dist=dist,
        )
        Path(folder, name).mkdir(exist_ok=True)
        model, params = slotted(seed, dist)
        found = job(dist, rows_of(seed, 24, rows_per_unit), model, params, loss, hooks)
    torch.save(found, Path(folder, f"{name}-{dist.rank}.pt"))
    return 0


def toys(dist, units, model, params, loss, hooks) -> dict:
    """A step's gradients, a training, scores and samples."""
    groups = [[*range(7)], [7, 8], [9], [10, 11, 12]]
    keep = Keep(params)
    metrics = train_step(model, params, units, groups, loss, keep, dist=dist)
    grads = torch.cat([grad.flatten() for grad in keep.grads])
    adapter = train_adapter(dist, units, model, params, loss, hooks)
    logps = score(model, [row for unit in units for row in unit.rows], 90, dist=dist)
    prompts = [list(unit.rows[0].ids[:9]) for unit in units[:9]]
    own = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=30)

    def answers(block):
        own_prompts = [prompts[i] for i in block]
        stops = {2, 7, 11, 20, 33}
        tokens, _ = generate(model, own_prompts, block, own, stops, batch_size=2, dist=dist)
        return tokens

    samples = []
    for answers_of_block in dist.parallel_map([[0, 1, 2, 3], [4, 5, 6, 7], [8]], answers):
        samples += answers_of_block
    held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    return {
        "values": torch.stack(list(metrics.values())).tolist(),
        "grads": grads,
        "adapter": adapter,
        "logps": logps,
        "samples": samples,
        "held": held,
    }


def train_adapter(dist, units, model, params, loss, hooks):
    """The adapter after all steps of a training."""
    train_model(model, params, units, loss, OptimizerConfig(3e-3, STEPS, 8), hooks)
    return torch.cat([param.detach().flatten() for param in params])


def stopped(dist, units, model, params, loss, hooks) -> int | None:
    """The last rank alone is asked to stop after LAST_STEP; returns where this one did."""

    class Steps:
        done = 0

        def step(self):
            self.done += 1
            if self.done == LAST_STEP and dist.rank == dist.world_size - 1:
                dist.signals.number = signal.SIGTERM

    steps = Steps()
    hooks = replace(hooks, progress=lambda *_: contextlib.nullcontext(steps))
    try:
        train_adapter(dist, units, model, params, loss, hooks)
    except Interrupted:
        return steps.done


def complaint(words: list[str]) -> None:
    """The last rank alone finds that something is wrong, while the others wait for what it should
    send.
    """
    with (dist := meet()).report_first_error():
        dist.connect("cpu", shard=False)

        def do(item: int) -> int:
            if item:
                raise UserError("row 7 is too long")
            return item

        list(dist.parallel_map([*range(dist.world_size)], do))


def all_toys(folder: str, seed: int, cases: list[str]) -> int:
    """Cases such as 2-pairs-shard; or a-2-4: two ranks stop, four go on from there; or complaint-2,
    which must fail.
    """
    torch.set_num_threads(1)
    failed = 0
    for case in cases:
        name, *rest = case.split("-")
        if name == "complaint":
            failed += not launch(int(rest[0]), lambda: run_main(complaint))
        elif name.isdecimal():
            failed += launch(
                int(name),
                lambda c=case, r=rest: together(seed, folder, c, r[0], r[1] == "shard", toys),
            )
        for world, job in (
            zip(map(int, rest), (stopped, train_adapter), strict=True)
            if len(rest) == 2 and not name.isdecimal()
            else ()
        ):
            failed += launch(
                world, lambda n=name, j=job: together(seed, folder, n, "pairs", False, j)
            )
            for file in Path(folder).glob(f"{name}-*.pt"):
                file.rename(file.with_name(f"{job.__name__}-{file.name}"))
    return failed


def start(rank: int, world: int, port: int, job) -> int:
    """Fork a rank that does `job` and exits with its code; returns its process id."""
    if pid := os.fork():
        return pid
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    code = 1
    try:
        code = job()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(world: int, job) -> int:
    """Start the ranks and wait for all; returns 1 if one failed, after it has ended the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [start(rank, world, port, job) for rank in range(world)]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False
    )  # the ranks wait for it
    print("ranks", *pids, flush=True)
    handlers = {
        n: signal.signal(n, lambda n, frame: [os.kill(pid, n) for pid in pids])
        for n in (signal.SIGTERM, signal.SIGINT)
    }
    failed = False
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not failed:
            failed = True
            time.sleep(0.1)  # as long as torchrun takes to notice
            for other in pids:
                os.kill(other, signal.SIGTERM)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    del store
    return int(failed)
