"""How rows are divided into the splits d0, d1, d2 and test.

D0 is text to pre-train on, D1 the teachers' ground truth, D2 the prompts without answers that all
later training uses, and test what the run is measured on. No two splits share a first human turn,
so that no split holds a dialogue of which another one holds the beginning.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from minmacpo import UserError
from minmacpo.data.records import Message, Pair

SPLITS = ("d0", "d1", "d2", "test")
UNIQUE_PROMPTS = ("d2", "test")  # splits that hold each prompt once

TOO_FEW = 30  # fewer test rows tell nothing: an accuracy then is good to about 0.2


def first_turn(pair: Pair) -> str:
    """What the human says first."""
    return next(message.content for message in pair.prompt if message.role == "user")


def assign_splits(turns: Iterable[str], shares: Mapping[str, float], seed: str) -> dict[str, str]:
    """{first turn: split}: the turns in random order, of which each split gets its share."""
    order = sorted(turns)  # so that the order of the rows does not matter
    random.Random(seed).shuffle(order)

    sizes = list(shares.values())
    split_of_turn = {}
    for index, name in enumerate(shares):
        start = round(sum(sizes[:index]) * len(order))
        end = round(sum(sizes[: index + 1]) * len(order))
        for turn in order[start:end]:
            split_of_turn[turn] = name
    return split_of_turn


def join_sides(pairs: Sequence[Pair], path: str) -> tuple[list[Pair], int]:
    """Pairs from two files with one answer a row: the good answers, and the bad ones.

    MACPO's authors released D1 as two such files, given here as "GOOD,BAD".

    Args:
        pairs: the rows of both files, their only answer as `chosen`.
        path: the setting's value, for the error message.

    Returns:
        The pairs of which the prompt has an answer in both files, and how many answers are left.

    Raises:
        UserError: the rows do not come from two files.
    """
    file_names = list(dict.fromkeys(pair.meta["file"] for pair in pairs))
    if len(file_names) != 2:
        raise UserError(
            f"{path}: expected two files with usable rows, the good answers and the bad ones"
        )

    # Which side a row is on is told by its file
    good_by_prompt: dict[tuple[Message, ...], list[Pair]] = defaultdict(list)
    bad_by_prompt: dict[tuple[Message, ...], list[Pair]] = defaultdict(list)
    for pair in pairs:
        is_good = pair.meta["file"] == file_names[0]
        by_prompt = good_by_prompt if is_good else bad_by_prompt
        by_prompt[pair.prompt].append(pair)

    joined = []
    for prompt, good_rows in good_by_prompt.items():
        # a prompt that occurs several times is joined in order; answers that are left stay alone
        for good, bad in zip(good_rows, bad_by_prompt.get(prompt, ()), strict=False):
            if good.chosen != bad.chosen:
                joined.append(replace(good, rejected=bad.chosen))
    return joined, len(pairs) - 2 * len(joined)


def split_pairs(
    pairs: Sequence[Pair],
    shares: Sequence[float],
    seed: int,
    own_files: Mapping[str, Sequence[Pair]] | None = None,
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """The four splits, and how many pairs were left out by reason.

    Args:
        pairs: the rows of data.path, which are divided.
        shares: of the first turns of `pairs`: d0, d1, d2, test.
        own_files: {split: its rows} of the splits that have a file of their own; they hold nothing
            but these rows. A first turn of such a test is in the test alone, then one of such a d1,
            then one of such a d2.
    """
    own_files = own_files or {}
    split_of_turn = assign_first_turns(pairs, shares, seed, own_files)

    # Every row goes to the split of its first turn, if it may stand there
    splits = {name: [] for name in SPLITS}
    left_out = Counter(d2=0, test=0)
    seen_prompts = set()

    def place(pair: Pair, source: str | None) -> None:
        name = split_of_turn.get(first_turn(pair))
        if name is None:
            return  # the shares sum to less than one
        if name in own_files and name != source:
            left_out["first turn of another split"] += 1
        elif name in UNIQUE_PROMPTS and pair.prompt in seen_prompts:
            left_out[name] += 1
        else:
            splits[name].append(pair)
            seen_prompts.add(pair.prompt)

    for pair in pairs:
        place(pair, source=None)
    for source, rows in own_files.items():
        for pair in rows:
            place(pair, source)
    return splits, dict(left_out)


def assign_first_turns(
    pairs: Sequence[Pair],
    shares: Sequence[float],
    seed: int,
    own_files: Mapping[str, Sequence[Pair]],
) -> dict[str, str]:
    """{first turn: split} of all rows; see `split_pairs` for the arguments."""
    split_of_turn = {}
    for name in ("d2", "d1", "test"):  # a later one takes what an earlier one has, too
        for pair in own_files.get(name, ()):
            split_of_turn[first_turn(pair)] = name

    # The other turns are divided among the splits without a file of their own
    free_turns = {first_turn(pair) for pair in pairs} - split_of_turn.keys()
    free_shares = {}
    for name, share in zip(SPLITS, shares, strict=True):
        free_shares[name] = 0 if name in own_files else share
    return split_of_turn | assign_splits(free_turns, free_shares, f"{seed}/split")
