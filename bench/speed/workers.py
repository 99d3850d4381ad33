"""How long a finished run would take with other numbers of workers, from the times of its stages.

    python -m bench.speed.workers RUN [BESIDE]

The stages are handed out as pipeline/scheduler.py does it: the longest chain first, each as long as
its stage.json says, those that are linked in no time. BESIDE: the seconds that the program takes
beside its stages (imports, plan, report), in which one core works. Simulated: cores that share a
cache or memory are slower side by side.
"""

import heapq
import sys
from collections.abc import Mapping
from pathlib import Path

from minmacpo.pipeline.run_dir import finished_stages
from minmacpo.pipeline.scheduler import longest_chains
from minmacpo.runtime.progress import aligned

COUNTS = (1, 2, 4, 8)


def stage_seconds(stages: Mapping[str, dict]) -> dict[str, float]:
    """What each stage took.

    Args:
        stages: stage.json of all stages of a run, by name.
    """
    seconds = {}
    for name, stage in stages.items():
        seconds[name] = 0.0 if "linked_from" in stage else stage["seconds"]
    return seconds


def stage_sources(stages: Mapping[str, dict]) -> dict[str, set[str]]:
    """For each stage those that have to be finished before it, which stand before it here.

    One that was linked waits for the stage that it was taken from, as that is the same work.
    """
    sources: dict[str, set[str]] = {}

    def place(name: str) -> None:
        if name in sources:
            return
        stage = stages[name]
        before = set(stage["inputs"])
        before.add(stage.get("linked_from", "").partition("/")[2])  # behind the run's name
        before = {source for source in before if source in stages}
        for source in before:
            place(source)
        sources[name] = before

    for name in stages:
        place(name)
    return sources


def simulated_wall(
    sources: Mapping[str, set[str]], seconds: Mapping[str, float], workers: int
) -> float:
    """When the last stage is finished, if so many workers take the longest chain first."""
    chains = longest_chains(sources, seconds)
    missing = {name: set(before) for name, before in sources.items()}
    ready = [name for name, before in missing.items() if not before]
    running: list[tuple[float, str]] = []  # a heap of (end, stage)
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            name = max(ready, key=chains.__getitem__)
            ready.remove(name)
            heapq.heappush(running, (now + seconds[name], name))
        now, finished = heapq.heappop(running)
        for name, before in missing.items():
            if finished in before:
                before.remove(finished)
                if not before:
                    ready.append(name)
    return now


def main(folder: str, beside: str = "0") -> None:
    """Print the simulated wall over numbers of workers, and the longest chain."""
    stages = {notes["name"]: notes for _, notes in finished_stages(Path(folder))}
    seconds = stage_seconds(stages)
    sources = stage_sources(stages)
    alone = simulated_wall(sources, seconds, 1) + float(beside)
    rows = []
    for count in COUNTS:
        wall = simulated_wall(sources, seconds, count) + float(beside)
        rows.append([str(count), f"{wall:.1f}", f"{wall / alone:.2f}"])
    longest = max(longest_chains(sources, seconds).values()) + float(beside)
    rows.append(["any number", f"{longest:.1f}", f"{longest / alone:.2f}"])
    print(aligned(["workers", "seconds", "of one"], rows))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"{__doc__}\nerror: expected RUN, and perhaps BESIDE")
    main(*sys.argv[1:])
