"""The splits: no first turn in two of them, each prompt once where that matters."""

import random
from collections import Counter

import pytest
from conftest import shared

from minmacpo.data.formats import read_data
from minmacpo.data.records import Message, Pair, example_id
from minmacpo.data.splits import SPLITS, first_turn, split_pairs

QUARTERS = (0.25, 0.25, 0.25, 0.25)


def many_pairs(seed: int, count: int) -> list[Pair]:
    """Pairs of one or two human turns, with repeated first turns and repeated prompts."""
    rng = random.Random(seed)
    pairs = []
    occurrences = Counter()
    for _ in range(count):
        prompt = (Message("user", f"first {rng.randrange(count // 2)}"),)
        if rng.random() < 0.5:
            second_turn = Message("user", f"then {rng.randrange(3)}")
            prompt = (*prompt, Message("assistant", "and"), second_turn)
        pair_id = example_id(prompt, occurrences[prompt])
        occurrences[prompt] += 1
        pairs.append(Pair(pair_id, prompt, f"good {rng.random()}", f"bad {rng.random()}"))
    return pairs


def check_splits(pairs: list[Pair], shares, seed: int) -> None:
    """All that holds whatever the pairs are."""
    splits, left_out = split_pairs(pairs, shares, seed)
    assert tuple(splits) == SPLITS

    # no first turn stands in two splits, and each split has its share of them
    turns = {name: {first_turn(pair) for pair in part} for name, part in splits.items()}
    num_turns = len({first_turn(pair) for pair in pairs})
    for index, name in enumerate(SPLITS):
        for other in SPLITS[index + 1 :]:
            assert not turns[name] & turns[other]
        assert abs(len(turns[name]) - shares[index] * num_turns) <= 1

    # d2 and test have every prompt once
    for name in ("d2", "test"):
        prompts = [pair.prompt for pair in splits[name]]
        assert len(prompts) == len(set(prompts))

    # every pair stands in at most one split, in the order of the rows
    order = {pair.id: number for number, pair in enumerate(pairs)}
    all_ids = []
    for part in splits.values():
        numbers = [order[pair.id] for pair in part]
        assert numbers == sorted(numbers)
        all_ids += [pair.id for pair in part]
    assert len(all_ids) == len(set(all_ids))

    if sum(shares) > 0.999:
        # nothing but repeated prompts of d2 and test is left out
        used = {pair.prompt for part in splits.values() for pair in part}
        assert used == {pair.prompt for pair in pairs}
    assert split_pairs(pairs, shares, seed) == (splits, left_out)


@pytest.mark.parametrize(
    "shares",
    [(0.5, 0.15, 0.25, 0.1), QUARTERS, (0, 0.2, 0.2, 0.1), (0.0, 0.5, 0.3, 0.2)],
)
@pytest.mark.parametrize("count", [40, 400])
def test_splits_share_no_first_turn(shares, count, seed):
    check_splits(many_pairs(seed, count), shares, seed)


def test_splits_of_the_real_files():
    pairs, _ = read_data(str(shared("data/hh-rlhf")))
    check_splits(pairs, (0.5, 0.15, 0.25, 0.1), 0)


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_rows():
    pairs = many_pairs(0, 300)
    shares = (0.5, 0.15, 0.25, 0.1)
    splits, _ = split_pairs(pairs, shares, 1)
    other_seed, _ = split_pairs(pairs, shares, 2)
    assert splits != other_seed

    shuffled = random.Random(0).sample(pairs, len(pairs))
    again, _ = split_pairs(shuffled, shares, 1)
    for name in SPLITS:
        assert {pair.prompt for pair in again[name]} == {pair.prompt for pair in splits[name]}


def test_prompts_that_occur_again_are_left_out_of_d2_and_test_and_counted():
    pairs = many_pairs(0, 400)
    splits, left_out = split_pairs(pairs, QUARTERS, 0)

    assert type(left_out) is dict  # it is printed
    assert left_out.keys() == {"d2", "test"}
    assert sum(map(len, splits.values())) + sum(left_out.values()) == len(pairs)
    for name, count in left_out.items():
        turns = {first_turn(pair) for pair in splits[name]}
        rows = sum(first_turn(pair) in turns for pair in pairs)
        assert count == rows - len(splits[name])


def test_splits_with_files_of_their_own_share_no_first_turn_with_others(seed):
    rng = random.Random(seed)

    def random_pairs(count: int, answer: str) -> list[Pair]:
        pairs = []
        for number in range(count):
            prompt = (
                Message("user", f"first {rng.randrange(60)}"),
                Message("assistant", "a"),
                Message("user", f"{rng.randrange(2)}"),
            )
            pairs.append(Pair(f"{answer}{number}", prompt, answer, "no"))
        return pairs

    pairs = random_pairs(80, "path")
    with_file = rng.sample(["d1", "d2", "test"], rng.randint(1, 3))
    own_files = {name: random_pairs(25, name) for name in with_file}
    splits, left_out = split_pairs(pairs, (0.4, 0.2, 0.2, 0.2), 0, own_files)

    turns = {name: {first_turn(pair) for pair in part} for name, part in splits.items()}
    for name in SPLITS:
        for other in SPLITS:
            assert name == other or not turns[name] & turns[other]
        source = name if name in own_files else "path"
        assert {pair.chosen for pair in splits[name]} <= {source}

    num_rows = len(pairs) + sum(map(len, own_files.values()))
    num_used = sum(map(len, splits.values()))
    assert num_used + sum(left_out.values()) <= num_rows

    # what stands in a test of its own stays there; then in such a d1; then in such a d2
    strongest = next(name for name in ("test", "d1", "d2") if name in own_files)
    assert turns[strongest] == {first_turn(pair) for pair in own_files[strongest]}
