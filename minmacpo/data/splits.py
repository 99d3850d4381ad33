"""How rows are assign_splits to the splits d0, d1, d2 and test."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from minmacpo import UserError
from minmacpo.data.records import Pair

SLICES = ("d0", "d1", "d2", "test")


def first_turn(pair: Pair) -> str:
    """What the human says first; slices have none in common."""
    return next(message.content for message in pair.prompt if message.role == "user")


def assign_splits(turns: Iterable[str], shares: Mapping[str, float], seed: str) -> dict[str, str]:
    """{turn: slice}: different first turns in random order, of which each slice gets its share."""
    order, sizes = sorted(turns), [*shares.values()]
    random.Random(seed).shuffle(order)
    ends = [round(sum(sizes[:i]) * len(order)) for i in range(len(sizes) + 1)]
    return {turn: name for i, name in enumerate(shares) for turn in order[ends[i] : ends[i + 1]]}


def join_sides(pairs: Sequence[Pair], path: str) -> tuple[list[Pair], int]:
    """(pairs of one file's answers as chosen and another's to the same prompts as rejected, how many answers found no
    other side), for `path` "GOOD,BAD": MACPO's authors released D1 as two such files. UserError if it names not two."""
    names = [*dict.fromkeys(pair.meta["file"] for pair in pairs)]
    if len(names) != 2:
        raise UserError(
            f"{path}: expected two files with usable rows, the good answers and the bad ones"
        )
    sides: list[dict] = [{}, {}]
    for pair in pairs:
        sides[names.index(pair.meta["file"])].setdefault(pair.prompt, []).append(pair)
    joined = [
        replace(good, rejected=bad.chosen)
        for prompt, goods in sides[0].items()
        for good, bad in zip(goods, sides[1].get(prompt, ()), strict=False)
        if good.chosen != bad.chosen
    ]
    return joined, len(pairs) - 2 * len(joined)


def split_pairs(
    pairs: Sequence[Pair],
    shares: Sequence[float],
    seed: int,
    own: Mapping[str, Sequence[Pair]] | None = None,
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """{"d0", "d1", "d2", "test"}: slices disjoint by first human turn (shares count first turns of `pairs`), those
    in `own` made of nothing but the rows given there; and how many pairs were left out: of d2 and test because
    their prompt had occurred before, and of any file because the test, or D1, has that first turn in its own."""
    own = own or {}
    where = {first_turn(pair): name for name in ("d2", "d1", "test") for pair in own.get(name, ())}
    shares = {name: 0 if name in own else share for name, share in zip(SLICES, shares, strict=True)}
    where |= assign_splits(
        {first_turn(pair) for pair in pairs} - where.keys(), shares, f"{seed}/split"
    )
    slices, prompts, left_out = {name: [] for name in SLICES}, set(), Counter(d2=0, test=0)
    rows = [(None, pair) for pair in pairs] + [
        (name, pair) for name, given in own.items() for pair in given
    ]
    for source, pair in rows:
        name = where.get(first_turn(pair))
        if name in own and name != source:
            left_out["first turn of another slice"] += 1
        elif name in ("d2", "test") and pair.prompt in prompts:
            left_out[name] += 1
        elif name:
            slices[name].append(pair)
            prompts.add(pair.prompt)
    return slices, dict(left_out)
