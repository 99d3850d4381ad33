"""Files of rows, HH-RLHF dialogues, the slices, the records, and what becomes of over-long rows."""

import gzip
import json
import os
import random
from collections import Counter
from dataclasses import replace

import pytest
from conftest import shared

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.data.chat_template import render, render_prompt
from minmacpo.data.formats import parse_row, read_data, split_dialogue
from minmacpo.data.readers import find_files, read_lines
from minmacpo.data.records import Example, Message, Pair, Sample, example_id
from minmacpo.data.splits import SPLITS, split_pairs
from minmacpo.pipeline import prepare_data
from minmacpo.runtime.files import read_rows, write_rows

USER, BOT = "user", "assistant"


def dialogue(*turns: str) -> str:
    """Human, Assistant, Human … turns, as the files have them."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def row(prompt: tuple[str, ...] = ("hi",), chosen: str = "good", rejected: str = "bad") -> str:
    return json.dumps(
        {"chosen": dialogue(*prompt, chosen), "rejected": dialogue(*prompt, rejected)}
    )


def write(path, *lines: str | bytes):
    raw = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def read_hh(path: str, most: int | None = None) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """The pairs of a file or folder, and what was counted of each file."""
    pairs, reports = read_data(path, max_rows=most)
    return pairs, {name: dict(report.counts) for name, report in reports.items()}


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        read_hh(str(path))
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


# ---- one dialogue ---------------------------------------------------------------------------


def test_a_dialogue_is_cut_at_its_last_assistant_turn():
    prompt, answer = split_dialogue(dialogue("a", "b", "c", "d"))
    assert prompt == (Message(USER, "a"), Message(BOT, "b"), Message(USER, "c")) and answer == "d"


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("\n\nHuman: q\n\nAssistant: a", [(USER, "q")], "a"),
        ("\n\nHuman: q\n\nAssistant:", [(USER, "q")], ""),
        ("\n\nHuman:q\n\nAssistant:a", [(USER, "q")], "a"),
        # colons, blank lines and the marks' words inside a turn start no turn
        (
            "\n\nHuman: x: y\n\nmore\nHuman: no\n\nAssistant: a\n\nb",
            [(USER, "x: y\n\nmore\nHuman: no")],
            "a\n\nb",
        ),
        # a human turn behind the last answer belongs to it, as the files have it
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r", [(USER, "q")], "a\n\nHuman: r"),
        # two turns of one speaker
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [(USER, "a"), (USER, "b")], "c"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [(USER, "a"), (BOT, "b")], "c"),
        ("\n\nAssistant: a", [], "a"),
        ("\r\n  \n\nHuman: q\n\nAssistant:  a \n", [(USER, "q")], "a"),
    ],
)
def test_odd_dialogues(text, prompt, answer):
    assert split_dialogue(text) == (tuple(Message(*m) for m in prompt), answer)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "\n\nHuman: q", "\nHuman: q\nAssistant: a", "intro\n\nHuman: q\n\nAssistant: a"],
)
def test_no_dialogue(text):
    with pytest.raises(ValueError):
        split_dialogue(text)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (dialogue("q", "a"), dialogue("q", "b"), "kept"),
        (dialogue("q", "a", "r", "c"), dialogue("q", "a", "r", "d"), "kept"),
        (dialogue("q", "a"), dialogue("p", "b"), "prompts differ"),
        (dialogue("q", "a", "r", "c"), dialogue("q", "b", "r", "c"), "prompts differ"),
        (dialogue("q", ""), dialogue("q", "b"), "empty answer"),
        (dialogue("q", "a"), dialogue("q", "  "), "empty answer"),
        (dialogue("q", "a"), dialogue("q", "a "), "identical answers"),
        (dialogue("", "a"), dialogue("", "b"), "no human turn before the answer"),
        (dialogue("q", "a"), dialogue("q", "b", "c"), "human turn at the end"),
        (dialogue("q", "", "c"), dialogue("q", "b"), "human turn at the end"),
        (dialogue("q", "Human: a"), dialogue("q", "\nHuman: b"), "kept"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no human turn before the answer"),
        (
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: b",
            "no human turn before the answer",
        ),
    ],
)
def test_why_a_row_is_used_or_not(chosen, rejected, reason):
    pair, found = parse_row({"chosen": chosen, "rejected": rejected})
    assert found == reason and (pair is None) == (reason != "kept")
    if pair:
        assert pair.prompt == split_dialogue(chosen)[0]
        assert (pair.chosen, pair.rejected) == (
            split_dialogue(chosen)[1],
            split_dialogue(rejected)[1],
        )


# ---- files ----------------------------------------------------------------------------------


def test_plain_and_gzipped_one_file_and_a_folder(tmp_path):
    rows = [row((f"question {i}",)) for i in range(5)]
    plain = write(tmp_path / "one" / "a.jsonl", *rows)
    packed = write(tmp_path / "two" / "a.jsonl.gz", *rows)
    odd = write(tmp_path / "three" / "data.txt", *rows)
    pairs, counts = read_hh(str(plain))
    assert len(pairs) == 5 and counts == {"a": {"read": 5, "kept": 5}}
    assert read_hh(str(packed)) == (pairs, counts) and read_hh(str(packed.parent)) == (
        pairs,
        counts,
    )
    assert [replace(p, meta={}) for p in read_hh(str(odd))[0]] == [
        replace(p, meta={}) for p in pairs
    ]


def test_a_folder_is_read_through_its_subfolders_and_only_its_rows(tmp_path):
    write(tmp_path / "b" / "x.jsonl", row(("b",)))
    write(tmp_path / "a" / "x.jsonl.gz", row(("a",)), row(("a2",)))
    write(tmp_path / "x.jsonx", "nonsense")
    write(tmp_path / "README.md", "nonsense")
    (tmp_path / "folder.jsonl").mkdir()
    pairs, counts = read_hh(str(tmp_path))
    assert [p.prompt[0].content for p in pairs] == ["a", "a2", "b"]
    assert sorted(c["read"] for c in counts.values()) == [1, 2]
    assert {p.meta["file"] for p in pairs} == set(counts) and len(counts) == 2
    assert [f.name for f in find_files(str(tmp_path))] == ["x.jsonl.gz", "x.jsonl"]


def test_byte_order_mark_blank_lines_crlf_and_a_missing_last_line_break(tmp_path):
    raw = b"\xef\xbb\xbf" + row(("a",)).encode() + b"\r\n\r\n   \n" + row(("b",)).encode()
    (tmp_path / "x.jsonl").write_bytes(raw)
    pairs, counts = read_hh(str(tmp_path))
    assert [p.prompt[0].content for p in pairs] == ["a", "b"]
    assert counts == {"x": {"read": 4, "kept": 2, "blank line": 2}}


def test_line_separators_inside_a_row_do_not_end_it(tmp_path):
    raw = json.dumps(
        {"chosen": dialogue("a\u2028b\x85c", "d"), "rejected": dialogue("a\u2028b\x85c", "e")},
        ensure_ascii=False,
    )
    pairs, _ = read_hh(str(write(tmp_path / "x.jsonl", raw)))
    assert pairs[0].prompt[0].content == "a\u2028b\x85c"


BROKEN = {
    "no JSON": ('{"chosen": ', "JSON"),
    "half a line": (row()[:-9], "JSON"),
    "no object": ("[1, 2]", "chosen"),
    "a number": ("7", "chosen"),
    "null": ("null", "chosen"),
    "missing chosen": (json.dumps({"rejected": dialogue("q", "a")}), "'chosen'"),
    "missing rejected": (json.dumps({"chosen": dialogue("q", "a")}), "'rejected'"),
    "wrong type": (
        json.dumps({"chosen": ["q"], "rejected": dialogue("q", "a")}),
        "'chosen' is a list, and text in the rows before",
    ),
    "null value": (
        json.dumps({"chosen": dialogue("q", "a"), "rejected": None}),
        "'rejected' is absent, and text in the rows before",
    ),
    "no dialogue": (json.dumps({"chosen": "good", "rejected": "bad"}), "no dialogue"),
    "empty text": (json.dumps({"chosen": "", "rejected": dialogue("q", "a")}), "no dialogue"),
    "half a surrogate pair": (
        '{"chosen": "\\n\\nHuman: \\ud83d\\n\\nAssistant: a", "rejected": "x"}',
        "surrogate",
    ),
    "invalid UTF-8": (b'{"chosen": "\xff\xfe"}', "UTF-8"),
    "UTF-16": (row().encode("utf-16"), "UTF-8"),
    "deep nesting": ("[" * 100_000, "JSON"),
    "a huge number": ('{"chosen": ' + "9" * 5000 + "}", "JSON"),
}


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_row_that_cannot_be_read_is_an_error_with_file_and_line(tmp_path, line, name):
    raw, words = BROKEN[line]
    message = refused(write(tmp_path / name, row(("a",)), row(("b",)), raw, row(("c",))))
    assert f"{tmp_path / name}, line 3" in message and words in message and len(message) < 600


def test_a_truncated_or_broken_gzip_names_file_and_line(tmp_path):
    rng = random.Random(0)
    lines = [row((f"question {rng.random()}",)) for _ in range(2000)]
    whole = write(tmp_path / "x.jsonl.gz", *lines).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    message = refused(tmp_path / "x.jsonl.gz")
    number = int(message.partition("line ")[2].partition(":")[0].partition(" ")[0])
    assert str(tmp_path / "x.jsonl.gz") in message and 0 < number < 2000
    (tmp_path / "x.jsonl.gz").write_bytes(row().encode())
    assert "x.jsonl.gz" in refused(tmp_path / "x.jsonl.gz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "x.jsonl.gz").write_bytes(flipped)
    assert "x.jsonl.gz" in refused(tmp_path / "x.jsonl.gz")


def test_paths_without_data(tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "no .jsonl" in refused(tmp_path)
    (tmp_path / "x.jsonl").touch()
    assert "no usable row" in refused(tmp_path)
    write(tmp_path / "x.jsonl", row(chosen="same", rejected="same"), row(chosen=""))
    message = refused(tmp_path)
    assert (
        "no usable row" in message and "identical answers" in message and "empty answer" in message
    )


def test_a_line_that_cannot_be_read_is_found_only_if_it_is_reached(tmp_path):
    path = write(tmp_path / "x.jsonl", row(("a",)), "broken")
    assert len(read_hh(str(path), 1)[0]) == 1
    assert "line 2" in refused(path)


def test_max_examples_is_spread_over_the_files(tmp_path):
    for name, count in (("a", 10), ("b", 10), ("c", 1)):
        write(tmp_path / f"{name}.jsonl", *[row((f"{name}{i}",)) for i in range(count)])
    _, counts = read_hh(str(tmp_path), 7)
    assert {k: v["read"] for k, v in counts.items()} == {"a": 3, "b": 2, "c": 1}
    assert sum(v["read"] for v in read_hh(str(tmp_path), 2)[1].values()) == 2
    assert len(read_hh(str(tmp_path), 10**6)[0]) == 21


def test_lines_are_numbered_from_one(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", "a", "", "b")
    assert list(read_lines(path)) == [(1, "a"), (2, ""), (3, "b")]


# ---- the real files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return read_hh(str(shared("data/hh-rlhf")))


def test_the_counts_of_the_real_files(real):
    pairs, counts = real
    helpful, harmless = counts["helpful-base.test"], counts["harmless-base.test"]
    assert helpful["read"] == 2354 and harmless["read"] == 2312
    assert helpful["prompts differ"] == 9 and harmless["prompts differ"] == 5
    assert helpful["empty answer"] == 4 and harmless["empty answer"] == 4
    assert (helpful["kept"], harmless["kept"]) == (2339, 2303)
    assert helpful["identical answers"] == 2 and harmless.get("identical answers", 0) == 0
    for count in counts.values():
        assert sum(v for k, v in count.items() if k != "read") == count["read"]
    assert len(pairs) == helpful["kept"] + harmless["kept"] == len({p.id for p in pairs})
    assert Counter(p.meta["file"] for p in pairs) == {
        name: count["kept"] for name, count in counts.items()
    }


def test_every_real_pair_is_the_text_of_its_row(real):
    kept = iter(real[0])
    for file in find_files(str(shared("data/hh-rlhf"))):
        for _, line in read_lines(file):
            if parse_row(json.loads(line))[0] is None:
                continue
            pair, raw = next(kept), json.loads(line)
            marks = {USER: "Human", BOT: "Assistant"}
            start = "".join(f"\n\n{marks[m.role]}: {m.content}" for m in pair.prompt)
            for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                wanted = "".join(raw[side].split())
                assert "".join(f"{start}\n\nAssistant: {text}".split()) == wanted
            assert pair.prompt[-1].role == USER and "\n\nAssistant:" not in pair.chosen
    assert next(kept, None) is None


def test_real_slices(real):
    check_slices(real[0], (0.5, 0.15, 0.25, 0.1), 0)


# ---- slices ---------------------------------------------------------------------------------


def check_slices(pairs: list[Pair], shares, seed: int) -> None:
    found, left_out = split_pairs(pairs, shares, seed)
    assert tuple(found) == SPLITS
    first = {
        name: {next(m.content for m in p.prompt if m.role == USER) for p in part}
        for name, part in found.items()
    }
    turns = {next(m.content for m in p.prompt if m.role == USER) for p in pairs}
    for i, a in enumerate(SPLITS):
        assert all(not first[a] & first[b] for b in SPLITS[i + 1 :])
        assert abs(len(first[a]) - shares[i] * len(turns)) <= 1
    for name in ("d2", "test"):
        prompts = [p.prompt for p in found[name]]
        assert len(prompts) == len(set(prompts))
    ids = [p.id for part in found.values() for p in part]
    assert len(ids) == len(set(ids)) and set(ids) <= {p.id for p in pairs}
    order = {p.id: i for i, p in enumerate(pairs)}
    assert all(
        [order[p.id] for p in part] == sorted(order[p.id] for p in part) for part in found.values()
    )
    # nothing but repeated prompts of d2 and test is left out, when the shares sum to one
    if sum(shares) > 0.999:
        kept = {(p.prompt) for part in found.values() for p in part}
        assert kept == {p.prompt for p in pairs}
    assert split_pairs(pairs, shares, seed) == (found, left_out)


def many_pairs(seed: int, count: int) -> list[Pair]:
    rng = random.Random(seed)
    pairs, seen = [], Counter()
    for _ in range(count):
        prompt = (Message(USER, f"first {rng.randrange(count // 2)}"),)
        if rng.random() < 0.5:
            prompt += (Message(BOT, "and"), Message(USER, f"then {rng.randrange(3)}"))
        name = example_id(prompt, seen[prompt])
        seen[prompt] += 1
        pairs.append(Pair(name, prompt, f"good {rng.random()}", f"bad {rng.random()}"))
    return pairs


@pytest.mark.parametrize(
    "shares",
    [(0.5, 0.15, 0.25, 0.1), (0.25, 0.25, 0.25, 0.25), (0, 0.2, 0.2, 0.1), (0.0, 0.5, 0.3, 0.2)],
)
def test_slices_are_disjoint_by_first_turn_and_of_the_shares_asked_for(shares, seed):
    check_slices(many_pairs(seed, 400), shares, seed)


def test_slices_depend_on_the_seed_and_nothing_else():
    pairs = many_pairs(0, 200)
    one, two = (split_pairs(pairs, (0.5, 0.15, 0.25, 0.1), s)[0] for s in (1, 2))
    assert one != two
    shuffled = random.Random(0).sample(pairs, len(pairs))
    again = split_pairs(shuffled, (0.5, 0.15, 0.25, 0.1), 1)[0]
    assert all({p.prompt for p in again[n]} == {p.prompt for p in one[n]} for n in SPLITS)


def test_prompts_that_occur_again_are_left_out_of_d2_and_test_and_counted():
    pairs = many_pairs(0, 400)
    slices, left_out = split_pairs(pairs, (0.25, 0.25, 0.25, 0.25), 0)
    assert sum(map(len, slices.values())) + sum(left_out.values()) == len(pairs)
    assert left_out.keys() == {"d2", "test"} and type(left_out) is dict  # as show_plan prints it
    for name, count in left_out.items():
        first = {p.prompt[0].content for p in slices[name]}
        assert count == sum(p.prompt[0].content in first for p in pairs) - len(slices[name])


def test_ids_are_stable_and_tell_repeated_prompts_apart(tmp_path):
    pairs, _ = read_hh(
        str(write(tmp_path / "x.jsonl", row(chosen="a"), row(chosen="b"), row(("other",))))
    )
    assert len({p.id for p in pairs}) == 3
    assert [p.id for p in pairs] == [
        example_id(pairs[0].prompt, 0),
        example_id(pairs[0].prompt, 1),
        example_id(pairs[2].prompt),
    ]
    assert example_id((Message(USER, "hi"),)) == "aae6d70588143fa4"  # files and seeds depend on it


# ---- records --------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    return "".join(
        rng.choice('ab \n\t\r"\\\u2028\x85\u00e9\u4e2d\U0001f600\x00\x1f')
        for _ in range(rng.randint(0, 12))
    )


def test_records_go_to_json_and_back(tmp_path, seed):
    rng = random.Random(seed)
    for kind in (Example, Pair, Sample):
        records = []
        for number in range(30):
            prompt = tuple(
                Message(rng.choice((USER, BOT)), random_text(rng)) for _ in range(rng.randint(1, 3))
            )
            meta = {"file": random_text(rng), "n": number}
            if kind is Example:
                records.append(Example(f"id{number}", prompt, random_text(rng), meta))
            elif kind is Pair:
                refs = rng.choice([(None, None), (-rng.random() * 100, -1 / 3)])
                records.append(
                    Pair(
                        f"id{number}",
                        prompt,
                        random_text(rng),
                        random_text(rng),
                        "a",
                        "b",
                        *refs,
                        meta,
                    )
                )
            else:
                tokens = tuple(rng.randrange(10) for _ in range(rng.randint(1, 5)))
                records.append(
                    Sample(
                        f"id{number}",
                        prompt,
                        random_text(rng),
                        "stop",
                        tokens,
                        -rng.random(),
                        1e30,
                        "x",
                        2**62 + 1,
                        meta,
                    )
                )
        write_rows(tmp_path / "x.jsonl", records)
        assert read_rows(tmp_path / "x.jsonl", kind) == records


# ---- over-long rows -------------------------------------------------------------------------


def fitted(tokenizer, tmp_path, long: str, *pairs: Pair, prompt: int = 40, length: int = 64):
    words = [
        "@tiny",
        f"--data.max_prompt_length={prompt}",
        f"--data.max_length={length}",
        f"--data.truncation_mode={long}",
        "--data.template=plain",
        "--generate.max_new_tokens=8",
        "--model.student=x",
        "--model.teachers=a,b,c",
    ]
    config = parse(words).config
    return prepare_data.prepare_splits(config, {"d2": list(pairs)}, {}, [tokenizer], {}), config


def pair_of(*turns: str, chosen: str = "yes", rejected: str = "no") -> Pair:
    prompt = tuple(Message((USER, BOT)[i % 2], turn) for i, turn in enumerate(turns))
    return Pair(example_id(prompt), prompt, chosen, rejected)


LONG = "".join(chr(97 + i % 26) for i in range(300))


def test_over_long_rows_are_dropped_and_counted(tokenizer, tmp_path):
    short = pair_of("hello there")
    found, _ = fitted(
        tokenizer,
        tmp_path,
        "drop",
        short,
        pair_of(LONG),
        pair_of("hi", chosen=LONG),
        pair_of("ho", rejected=LONG),
    )
    assert found.slices["d2"] == [short]
    assert found.counts["slices"]["d2"] == {"rows": 1, "over-long prompt": 1, "over-long answer": 2}


@pytest.mark.parametrize("template", ["plain", "turns"])
def test_prompt_and_answer_are_counted_to_the_token(tokenizer, template):
    """A row of exactly max_length tokens, space before the answer and end token included, is kept."""
    for chosen, rejected in (("of course", "no"), ("no", "happy to help"), ("x y z", "日本")):
        pair = pair_of("where does kadol live ? " * 4, chosen=chosen, rejected=rejected)
        size = max(
            len(render(tokenizer, template, pair.prompt, text).ids) for text in (chosen, rejected)
        )
        prompt = len(render_prompt(tokenizer, template, pair.prompt))
        assert prompt > 16
        for most_prompt, most, kept in (
            (prompt, size, 1),
            (prompt, size - 1, 0),
            (prompt - 1, size, 0),
        ):
            reasons = Counter()
            words = [
                f"--data.max_prompt_length={most_prompt}",
                f"--data.max_length={most}",
                f"--data.template={template}",
            ]
            found = prepare_data.truncate_pair(
                parse(["@tiny", *words]).config, pair, [tokenizer], reasons
            )
            assert found == (pair if kept else None)
            assert reasons == (
                {} if kept else {f"over-long {'prompt' if most_prompt < prompt else 'answer'}": 1}
            )


@pytest.mark.parametrize("long", ["drop", "cut_prompt"])
def test_an_over_long_answer_is_not_taken_for_an_over_long_prompt(tokenizer, tmp_path, long):
    """The prompt is within max_prompt_length; it is the answer that leaves it no room. And the other way round."""
    medium = pair_of("q w e " * 5, chosen="x y z " * 6)
    limit = len(render(tokenizer, "plain", medium.prompt, medium.chosen).ids) - 1
    assert len(render_prompt(tokenizer, "plain", medium.prompt)) <= 40 < limit
    found, _ = fitted(
        tokenizer,
        tmp_path,
        long,
        pair_of("hi"),
        medium,
        pair_of(LONG),
        pair_of(LONG, chosen=LONG),
        length=limit,
    )
    cuts = (
        {"over-long answer": 2, "over-long prompt": 1}
        if long == "drop"
        else {"over-long answer": 1, "prompt cut": 2}
    )
    assert found.counts["slices"]["d2"] == {
        "rows": 4 - cuts.get("over-long prompt", 0) - cuts["over-long answer"],
        **cuts,
    }


def test_a_prompt_that_no_cut_makes_short_enough_is_dropped(tokenizer, tmp_path):
    """The marks of the template alone are longer than max_prompt_length."""
    config = fitted(tokenizer, tmp_path, "cut_prompt", pair_of("hi"))[1]
    marks, reasons = len(render_prompt(tokenizer, "plain", (Message(USER, ""),))), Counter()
    config = replace(config, data=replace(config.data, max_prompt_length=marks - 1))
    assert prepare_data.truncate_pair(config, pair_of(LONG), [tokenizer], reasons) is None
    assert reasons == {"over-long prompt": 1}


def test_a_system_message_stays_when_its_dialogue_is_cut():
    system, turns = (
        Message("system", "be kind"),
        tuple(Message("user", f"turn {i} of them") for i in range(4)),
    )

    def cut(most: int, *prompt: Message):
        return prepare_data.cut_prompt(
            prompt, lambda messages: sum(len(m.content) for m in messages) <= most
        )

    assert cut(40, system, *turns) == (system, *turns[2:])
    short = cut(12, system, *turns)
    assert short[0] == system and len(short) == 2 and turns[-1].content.endswith(short[1].content)
    assert cut(7, system, *turns) is None and cut(4, system) == (Message("system", "kind"),)


def test_a_cut_prompt_keeps_its_end(tokenizer, tmp_path):
    short, long = pair_of("hello there"), pair_of("first", "old answer", LONG + " the end of it")
    found, config = fitted(
        tokenizer, tmp_path, "cut_prompt", short, long, pair_of("hi", chosen=LONG)
    )
    assert found.counts["slices"]["d2"] == {"rows": 2, "prompt cut": 1, "over-long answer": 1}
    kept, cut = found.slices["d2"]
    assert kept == short
    assert cut == replace(long, prompt=cut.prompt)  # answers and id are as they were
    assert [m.role for m in cut.prompt] == [USER] and cut.prompt[0].content.endswith(
        " the end of it"
    )
    assert (LONG + " the end of it").endswith(cut.prompt[0].content)
    size = len(render_prompt(tokenizer, config.data.template, cut.prompt))
    assert 20 < size <= config.data.max_prompt_length  # cut no more than needed
    whole = len(render(tokenizer, config.data.template, cut.prompt, cut.chosen).ids)
    assert whole <= config.data.max_length


def test_prompts_that_a_cut_makes_equal_stand_in_one_slice(tokenizer, tmp_path):
    config = fitted(tokenizer, tmp_path, "cut_prompt", pair_of("hi"))[1]
    long = {
        name: [pair_of(LONG + name, "old", "the last question"), pair_of("of " + name)]
        for name in ("d1", "d2", "test")
    }
    found = prepare_data.prepare_splits(config, long, {}, [tokenizer], {})
    assert [len(found.slices[name]) for name in long] == [2, 1, 1]
    assert found.counts["slices"]["test"] == {"rows": 1, "prompt cut": 1, "equal after the cut": 1}


def test_runs_in_the_data_folder_are_no_data(tmp_path):
    file = write(tmp_path / "a" / "x.jsonl", row())
    write(tmp_path / "runs" / "hh" / "round1" / "samples.jsonl", "{}")
    (tmp_path / "runs/hh/config.toml").write_text("[run]\n")
    (tmp_path / "config.toml").write_text("[run]\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_files(str(tmp_path)) == [file]


def test_linked_folders_are_read_and_odd_names_shown(tmp_path):
    write(tmp_path / "elsewhere" / "x.jsonl", row())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    assert read_hh(str(tmp_path / "data"))[1] == {"x": {"read": 1, "kept": 1}}
    odd = os.fsdecode(b"latin\xe9.jsonl")
    (tmp_path / "elsewhere" / "x.jsonl").rename(tmp_path / "elsewhere" / odd)
    label = next(iter(read_hh(str(tmp_path / "data"))[1]))
    assert label.encode() == b"latin\\xe9"


def test_gzip_is_known_by_its_first_bytes(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(gzip.compress(row().encode()))
    assert len(read_hh(str(file))[0]) == 1


def test_rows_outside_the_shares_are_counted(tokenizer, tmp_path):
    file = write(tmp_path / "x.jsonl", *(row((f"question {i}",)) for i in range(100)))
    words = [
        "@tiny",
        f"--data.path={file}",
        "--data.shares=0.1,0.1,0.1,0.1",
        "--data.template=plain",
        "--model.student=x",
        "--model.teachers=a",
    ]
    found = prepare_data.prepare_data(parse(words).config, [tokenizer])
    assert found.counts["in no slice"] == 60 and found.counts["kept"] == 100


def test_whole_turns_go_first(tokenizer, tmp_path):
    long = pair_of(LONG, "middle", "the last question")
    found, _ = fitted(tokenizer, tmp_path, "cut_prompt", long)
    assert found.slices["d2"][0].prompt == (
        Message(BOT, "middle"),
        Message(USER, "the last question"),
    )


def test_an_answer_that_leaves_room_for_a_shorter_prompt_only(tokenizer, tmp_path):
    """max_length counts prompt and answer: a prompt within max_prompt_length may still be too long."""
    answer = "x y z " * 6
    room = len(tokenizer.encode(answer))
    pair = pair_of("q w e " * 5, chosen=answer)
    prompt = len(render_prompt(tokenizer, "plain", pair.prompt))
    assert prompt <= 40 < 48 < prompt + room
    dropped = fitted(tokenizer, tmp_path, "drop", pair_of("hi"), pair, length=48)[0]
    assert dropped.counts["slices"]["d2"]["rows"] == 1
    cut = fitted(tokenizer, tmp_path, "cut_prompt", pair_of("hi"), pair, length=room + 26)[
        0
    ].slices["d2"][1]
    assert len(render(tokenizer, "plain", cut.prompt, answer).ids) <= room + 26


def test_every_kept_row_fits_whatever_the_text(tokenizer, tmp_path, seed):
    rng = random.Random(seed)
    pairs = []
    for _ in range(60):
        turns = [
            random_text(rng).strip() + "x" * rng.randrange(30) for _ in range(rng.choice((1, 3)))
        ]
        pairs.append(
            pair_of(
                *turns, chosen="y" + random_text(rng).strip(), rejected="n" * rng.randint(1, 30)
            )
        )
    for long in ("drop", "cut_prompt"):
        found, config = fitted(tokenizer, tmp_path, long, pair_of("hi"), *pairs)
        counts = found.counts["slices"]["d2"]
        reasons = ("rows", "over-long prompt", "over-long answer", "equal after the cut")
        assert sum(counts.get(reason, 0) for reason in reasons) == 61
        for pair in found.slices["d2"]:
            assert (
                len(render_prompt(tokenizer, "plain", pair.prompt)) <= config.data.max_prompt_length
            )
            for text in (pair.chosen, pair.rejected):
                assert (
                    len(render(tokenizer, "plain", pair.prompt, text).ids) <= config.data.max_length
                )


def test_no_row_left_in_a_slice_is_an_error(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no row is left for d2"):
        fitted(tokenizer, tmp_path, "drop", pair_of(LONG))


def test_the_shortest_context_among_the_tokenizers_decides(tokenizer, tmp_path):
    class Wordy:
        bos = eos = 0

        def encode(self, text, start=False):
            return [1] * (3 * len(text))

    config = fitted(tokenizer, tmp_path, "drop", pair_of("hi"))[1]
    with pytest.raises(UserError, match="no row is left"):
        prepare_data.prepare_splits(
            config, {"d2": [pair_of("a question of twenty")]}, {}, [tokenizer, Wordy()], {}
        )


def test_weak_bases_read_shares_of_their_own(tokenizer, tmp_path):
    file = write(tmp_path / "x.jsonl", *(row((f"question {i}",)) for i in range(260)))

    def corpora(share: float, teachers: int = 2):
        words = [
            f"--data.path={file}",
            f"--pretrain.weak_share={share}",
            "--data.shares=0.8,0.05,0.1,0.05",
            "--model.student=x",
            f"--model.teachers={'a,b'[: 2 * teachers - 1]}",
            "--data.template=plain",
        ]
        return prepare_data.prepare_data(parse(["@tiny", *words]).config, [tokenizer]).corpora

    parts = corpora(0.5)
    assert list(parts) == ["strong", "weak1", "weak2"] and len(parts["strong"]) == 2 * 208
    assert 150 < len(parts["weak1"]) < 266 and parts["weak1"] != parts["weak2"]
    assert all(document in parts["strong"] for document in parts["weak1"])
    assert corpora(0.5) == parts and corpora(0.5, 1)["weak1"] == parts["weak1"]
    assert corpora(1.0)["weak1"] == parts["strong"]
