"""The stage that samples answers to every prompt."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from minmacpo.data.records import Sample
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.model_pool import Session, TextColumn, answer
from minmacpo.pipeline.run import Stage, StageContext
from minmacpo.pipeline.stage_log import show_first
from minmacpo.runtime.files import JsonlView, finished_shards, write_rows, write_shard

BLOCKS = 4  # times as many prompts as are sampled side by side, in a block: those behind get the places of answers that ended


def sample(
    session: Session,
    name: str,
    base: Base,
    adapter: Stage | None,
    prompts: TextColumn,
    agent: str,
    key: tuple,
    answers: int = 1,
    temperature: float | None = None,
    against: Stage | None = None,
) -> Stage:
    """`answers` sampled answers per prompt, as samples.jsonl, in the prompts' order; `temperature` in place of
    the run's; `against`: decoded contrastively, away from that adapter (generate.contrast)."""
    config = session.config
    if temperature is not None:
        config = replace(config, generate=replace(config.generate, temperature=temperature))

    def write_samples(work: StageContext) -> dict:
        """Sample in blocks of fixed size; a killed stage redoes one of them, or one a rank."""
        other = session.use(base, against, "against") if against else None
        loaded, size = session.use(base, adapter), config.generate.batch * BLOCKS
        asked = prompts.read()
        show_first(
            work,
            loaded,
            "prompt",
            [session.render(loaded, example.prompt) for example in islice(asked, 1)],
        )
        sizes = (len(session.render(loaded, example.prompt).ids) for example in asked)
        order = np.argsort(np.fromiter(sizes, np.int32).repeat(answers), kind="stable").astype(
            np.int32
        )

        def answers_to(block: np.ndarray) -> list[dict]:
            jobs, side = (
                [(asked[i // answers], i % answers) for i in block.tolist()],
                config.generate.batch,
            )
            return [
                asdict(s) for s in answer(config, loaded, agent, jobs, work.seed, other, None, side)
            ]

        files = in_blocks(
            work, [order[start : start + size] for start in range(0, len(order), size)], answers_to
        )
        if not work.dist.is_main:
            return {}
        counts = {"answers": len(order), "tokens": 0, "hit_length": 0, "empty": 0}
        write_rows(work.folder / "samples.jsonl", in_place(files, order, size, counts))
        for file in work.folder.glob("block*.jsonl"):
            file.unlink()
        return counts

    settings = asdict(config.generate) | prompts.settings | {"answers": answers, "agent": agent}
    settings |= (
        ({"contrastive": True} if against else {}) | {"blocks": BLOCKS} | session.quantised(base)
    )
    inputs, size = [base.stage, adapter, prompts.stage, against], f"{answers} answer(s) per prompt"
    return session.stage(name, "sample/1", settings, inputs, write_samples, key, size)


def in_blocks(
    work: StageContext, blocks: list[np.ndarray], answers_to: Callable[[np.ndarray], list[dict]]
) -> list[Path]:
    """A file of answers for each block of jobs; those that a stopped stage has left are kept, the ranks share the others. []
    for all ranks but the main one."""
    kept = finished_shards(work.folder) if work.dist.is_main else {}
    missing = work.dist.run_on_main(
        lambda: [number for number in range(len(blocks)) if number not in kept]
    )
    total, left = sum(map(len, blocks)), sum(len(blocks[number]) for number in missing)
    with work.progress(total, "answer", total - left) as progress:
        for number, found in zip(
            missing, work.dist.parallel_map([blocks[n] for n in missing], answers_to), strict=True
        ):
            if work.dist.is_main:
                kept[number] = write_shard(work.folder, number, found)
            progress.step(len(found))
    return [kept[number] for number in range(len(blocks))] if work.dist.is_main else []


def in_place(
    files: Sequence[Path], order: np.ndarray, size: int, counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of the blocks in the order of their jobs, `order` [N] being that in which they were made; counts them."""
    places, block = (
        np.empty_like(order),
        functools.cache(lambda number: JsonlView(files[number], Sample)),
    )
    places[order] = np.arange(len(order), dtype=order.dtype)
    for place in map(int, places):
        said = block(place // size)[place % size]
        counts["tokens"] += len(said.tokens)
        counts["hit_length"] += said.finish == "length"
        counts["empty"] += not said.response
        yield said
