"""Records and their ids."""

import random

from texts import hh_row, random_json_text, write_lines

from minmacpo.data.formats import read_data
from minmacpo.data.records import Example, Message, Pair, Sample, example_id
from minmacpo.runtime.files import read_rows, write_rows


def test_ids_are_stable_and_tell_repeated_prompts_apart(tmp_path):
    file = write_lines(
        tmp_path / "x.jsonl", hh_row(chosen="a"), hh_row(chosen="b"), hh_row(("other",))
    )
    first, second, other = read_data(str(file))[0]

    assert first.prompt == second.prompt
    assert first.id == example_id(first.prompt, 0)
    assert second.id == example_id(first.prompt, 1)
    assert other.id == example_id(other.prompt)
    assert len({first.id, second.id, other.id}) == 3
    # files and seeds depend on it
    assert example_id((Message("user", "hi"),)) == "aae6d70588143fa4"


def random_prompt(rng: random.Random) -> tuple[Message, ...]:
    prompt = []
    for _ in range(rng.randint(1, 3)):
        prompt.append(Message(rng.choice(("user", "assistant")), random_json_text(rng)))
    return tuple(prompt)


def random_example(rng: random.Random, number: int) -> Example:
    meta = {"file": random_json_text(rng), "n": number}
    return Example(f"id{number}", random_prompt(rng), random_json_text(rng), meta)


def random_pair(rng: random.Random, number: int) -> Pair:
    chosen_logps, rejected_logps = rng.choice([(None, None), (-rng.random() * 100, -1 / 3)])
    return Pair(
        id=f"id{number}",
        prompt=random_prompt(rng),
        chosen=random_json_text(rng),
        rejected=random_json_text(rng),
        chosen_by="a",
        rejected_by="b",
        ref_chosen_logps=chosen_logps,
        ref_rejected_logps=rejected_logps,
        meta={"file": random_json_text(rng)},
    )


def random_sample(rng: random.Random, number: int) -> Sample:
    return Sample(
        id=f"id{number}",
        prompt=random_prompt(rng),
        response=random_json_text(rng),
        finish="stop",
        tokens=tuple(rng.randrange(10) for _ in range(rng.randint(1, 5))),
        logp=-rng.random(),
        perplexity=1e30,
        agent="x",
        seed=2**62 + 1,
        meta={"n": number},
    )


def test_records_go_to_json_and_back(tmp_path, seed):
    rng = random.Random(seed)
    makers = {Example: random_example, Pair: random_pair, Sample: random_sample}
    for record_type, make in makers.items():
        records = [make(rng, number) for number in range(30)]
        write_rows(tmp_path / "x.jsonl", records)
        assert read_rows(tmp_path / "x.jsonl", record_type) == records
