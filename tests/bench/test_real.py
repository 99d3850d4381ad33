"""The benchmark on real files: its split, its jobs under a budget of time, its reward models, and all of it made small."""

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from runs import invoke

from bench import real, real_scores, results
from minmacpo import UserError
from minmacpo.data.records import Message, Pair
from minmacpo.data.splits import first_turn
from minmacpo.runtime.files import write_rows

# as bench/real.toml, of models that can do nothing
SMALL = """
seeds = [0, 1]
most = { d1 = 12, d2 = 12, test = 10 }
full = ""
flags = '''@hh-real --macpo.controls=false --run.max_tokens_per_batch=400 --data.max_prompt_length=120 --data.max_length=160 --model.context=160 --model.vocab=330
--model.strong=16x1x2x32 --model.weak=8x1x2x16,16x1x2x16 --pretrain.strong_steps=3 --pretrain.weak_steps=2 --pretrain.batch=8
--lora.targets=q_proj --generate.max_new_tokens=8 --macpo.rounds=1 --eval.bootstrap=20'''
[shares]
helpful = [0.3, 0.15, 0.15, 0.15, 0.25]
harmless = [0.3, 0.15, 0.15, 0.15, 0.25]
alpaca = [0.6, 0.0, 0.2, 0.2, 0.0]
pku = [0.3, 0.15, 0.15, 0.15, 0.25]
[texts]
strong = { helpful = 1.0, harmless = 1.0, pku = 1.0, alpaca = 1.0 }
weak1 = { helpful = 0.9, harmless = 0.3, pku = 0.5, alpaca = 0.5 }
weak2 = { helpful = 0.3, harmless = 0.9, pku = 0.5, alpaca = 0.5 }
weak3 = { helpful = 0.5, harmless = 0.5, pku = 0.5, alpaca = 0.5 }
[main]
question = "Who is better?"
[main.groups]
"HH-Helpful" = "--data.path=helpful/d1 --data.d2=helpful/d2 --data.test=helpful/test"
[main.variants]
"MACPO" = "--macpo.controls=true"
"confident loss" = "--method=confident"
[main.world]
"MACPO" = ["main", "", "MACPO"]
[noise]
question = "And with wrong labels?"
[noise.groups]
"HH-Helpful" = "--data.path=helpful/d1 --data.d2=helpful/d2 --data.test=helpful/test"
[noise.variants]
"0 %" = "--macpo.controls=true"
"50 %" = "--data.noise=0.5 --macpo.teachers=2"
[noise.world]
[domain]
question = "Elsewhere?"
[domain.groups]
"Alpaca" = "--data.path=helpful/d1 --data.d2=alpaca/d2 --data.test=alpaca/test"
[domain.variants]
"MACPO" = ""
[domain.world]
"""
WORDS = "why do small birds sing loud songs near old green trees every early morning when nobody wants to hear them".split()


def rows_of_hh(seed: int, count: int, about: str) -> list[dict]:
    """Made-up rows of HH-RLHF's kind; some prompts are there twice, some have three turns."""
    rng, rows = random.Random(f"{seed}/{about}"), []

    def said(least: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(least, least + 5)))

    for i in range(count):
        head = f"\n\nHuman: {about} {i // 2 if i % 5 == 0 else i} {said(2)}"
        head += f"\n\nAssistant: {said(2)}\n\nHuman: {said(2)}" if i % 3 == 0 else ""
        rows += [
            {
                "chosen": f"{head}\n\nAssistant: {said(4)}",
                "rejected": f"{head}\n\nAssistant: {said(1)} !",
            }
        ] * (2 if i % 7 == 0 else 1)
    return rows


@pytest.fixture
def files(tmp_path, seed, monkeypatch) -> dict[str, str]:
    """HH files, one for Alpaca, and the small plan in the place of the real one."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan/real.toml").write_text(SMALL, "utf-8")
    monkeypatch.setattr(real, "HERE", tmp_path / "plan")
    for name in ("helpful", "harmless"):
        write_rows(tmp_path / f"{name}.jsonl", rows_of_hh(seed, 90, name))
    instructions = [
        {
            "instruction": f"name bird {i}",
            "input": "" if i % 2 else "quickly",
            "output": f"bird {i} sings",
        }
        for i in range(60)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(instructions))
    return {
        "helpful": str(tmp_path / "helpful.jsonl"),
        "harmless": str(tmp_path / "harmless.jsonl"),
        "alpaca": str(tmp_path / "alpaca.json"),
    }


def in_process(command: list[str], end: float = 0) -> tuple[int, str]:
    """A job without a process of its own."""
    if command[1] == "-m":
        return real.main(command[3:]), ""
    ended = invoke("train", *command[2:])
    return ended.code, ended.err


# ---- the split -----------------------------------------------------------------------------------


def parts_on_disk(root: Path) -> dict[tuple[str, str], list[Pair]]:
    """What the split wrote."""
    found = {}
    for file in root.glob("data/*/*.jsonl"):
        if file.stat().st_size:
            found[file.parent.name, file.stem] = real.read_data(str(file))[0]
    return found


def test_slices_share_no_first_turn_and_split_json_counts_them(files, tmp_path):
    plan = real.read_plan(tmp_path / "root", False)
    real.split(plan, files)
    parts = parts_on_disk(plan.root)
    owner = {}
    for (_, part), pairs in parts.items():
        for pair in pairs:
            assert owner.setdefault(first_turn(pair), part) == part
    assert {part for _, part in parts} == set(real.PARTS)
    counts = plan.counts()["rows"]
    assert all(counts[name][part] == len(pairs) for (name, part), pairs in parts.items())
    assert (
        counts["helpful"]["d1"] <= 12
        and counts["helpful"]["test"] <= 10
        and counts["alpaca"]["reward"] == 0
    )


def test_a_turn_that_two_sources_have_goes_to_one_slice(seed):
    def pairs(name: str) -> list[Pair]:
        return [
            Pair(f"{name}{i}", (Message("user", f"q {i}"),), f"yes {name} {i}", "no")
            for i in range(100)
        ]

    even = [0.2] * 5
    parts = real.divide({"a": pairs("a"), "b": pairs("b")}, {"a": even, "b": even}, {})
    for part in real.PARTS:
        first = {first_turn(pair) for pair in parts["a", part]}
        again = {first_turn(pair) for pair in parts["b", part]}
        assert len(first) == 20 and again == (set() if part in ("d2", "test") else first), (
            "a prompt of D2 and test occurs once"
        )


def test_a_turn_in_two_slices_is_caught():
    pair = Pair("a", (Message("user", "why"),), "so", "no")
    with pytest.raises(AssertionError, match="in common"):
        real.check_disjoint(
            {("helpful", "test"): [pair], ("pku", "reward"): [pair]}
            | {("x", part): [] for part in real.PARTS}
        )


def test_the_split_is_made_once_and_other_files_are_refused(files, tmp_path):
    plan = real.read_plan(tmp_path / "root", False)
    with pytest.raises(UserError, match="--harmless"):
        real.split(plan, {"helpful": files["helpful"]})
    real.split(plan, files)
    before = {file: file.stat().st_mtime_ns for file in plan.root.glob("data/*/*")}
    real.split(plan, {})
    real.split(plan, files)
    assert before == {file: file.stat().st_mtime_ns for file in plan.root.glob("data/*/*")}
    with pytest.raises(UserError, match="other files"):
        real.split(plan, files | {"helpful": files["harmless"]})


# ---- jobs ----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a job says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def made_up_jobs(folder: Path, count: int) -> list[real.Job]:
    return [real.Job(f"job {i}", [str(folder / str(i))], (folder / str(i),)) for i in range(count)]


def test_a_call_ends_in_time_and_the_next_one_goes_on(tmp_path):
    clock, ran = Clock(), []

    def run(command, end):
        """Three minutes a job; what would last longer than the call is asked to end."""
        ran.append(command[0])
        if clock.now + 180 > end:
            clock.now = end
            return 143, ""
        clock.now += 180
        Path(command[0]).write_text("done")
        return 0, ""

    every = made_up_jobs(tmp_path, 5)
    for done in (2, 4, 5):
        left = [job for job in every if not job.finished]
        started = clock.now
        assert real.work(left, 480, run, clock) == done - (5 - len(left))
        assert clock.now - started <= 480
    assert [Path(name).name for name in ran] == ["0", "1", "2", "2", "3", "4", "4"]


def test_a_job_that_fails_or_leaves_nothing_ends_the_call(tmp_path):
    for code, said, wanted in (
        (2, "error: no room\n", "job 0: exit 2: error: no room"),
        (0, "", "job 0: exit 0"),
        (143, "", "exit 143"),
    ):
        with pytest.raises(UserError, match=wanted):
            real.work(
                made_up_jobs(tmp_path, 2),
                480,
                lambda command, end, code=code, said=said: (code, said),
                Clock(),
            )


def test_a_process_is_asked_to_end_when_its_time_is_up():
    code, _ = real.run_alone(["sleep", "60"], real.time.monotonic() + 0.3)
    assert code in real.STOPPED


def test_every_case_of_the_real_plan_can_be_parsed_and_runs_once(tmp_path, monkeypatch):
    plan, full = (real.read_plan(tmp_path, full) for full in (False, True))
    monkeypatch.setattr(real.Plan, "counts", lambda self: {"files": dict.fromkeys(real.SOURCES)})
    assert {*plan.experiments} == {"main", "teachers", "noise", "domain", "rounds"}
    for seed in (0, 1):
        runs = real.runs_of(plan, seed)
        assert len({*runs}) == len(runs) == 14
        for each in (plan, full):
            configs = [real.parse(real.words_of(each, case, seed)).config for case in runs.values()]
            assert all(
                len(config.model.teachers) == config.macpo.teachers and config.data.shares[1] == 1
                for config in configs
            )
            each.config(seed, "bases", ["--data.path=x"])
    world = [place for found in plan.experiments.values() for place in found["world"].values()]
    assert all(
        any(
            (row.get("group", ""), row["name"]) == (group, name)
            for row in results.read(file)["variants"]
        )
        for file, group, name in world
    )
    assert {len(shares) for shares in plan.settings["shares"].values()} == {5}
    assert all(sum(shares) == pytest.approx(1) for shares in plan.settings["shares"].values())


def test_without_a_file_its_experiment_is_left_out(files, tmp_path):
    plan = real.read_plan(tmp_path / "root", False)
    real.split(plan, {name: files[name] for name in ("helpful", "harmless")})
    assert not [name for name in real.runs_of(plan, 0) if "alpaca" in name]
    found = {"question": "Elsewhere?", "world": {}, "rows": [], "missing": ["alpaca"], "wanted": 1}
    assert "Not measured: no file of alpaca was given." in real_scores.experiment("domain", found)


# ---- what is said --------------------------------------------------------------------------------


def a_row(trust: list[float]) -> dict:
    return {
        "group": "HH",
        "name": "MACPO",
        "seeds": [0, 1],
        "judge": "helpful",
        "trust": trust,
        "perplexity": [50.0, 52.5],
        "nats": [-0.1, -0.2, 0.0],
        "prefers": [0.5, 0.4, 0.6],
        "wins": [0.55, 0.5, 0.6],
        "score": [0.1, 0, 0.2],
        "length": 100.0,
    }


@pytest.mark.parametrize(
    "trust,sure",
    [
        ([0.58, 0.53, 0.63], True),
        ([0.52, 0.49, 0.55], False),
        ([0.5, 0.5, 0.5], False),
        ([0.4, 0.3, 0.45], True),
    ],
)
def test_not_informative_stands_beside_a_score_whose_judge_may_be_guessing(trust, sure):
    told = real_scores.cells({}, a_row(trust))
    assert ("not informative" not in " ".join(told)) == sure and any(
        f"{trust[0]:.2f}" in cell for cell in told
    )


def test_intervals_and_differences_are_those_of_the_arrays(seed):
    rng = np.random.default_rng(seed)
    naive, mine = (
        [
            {
                "logp": -rng.uniform(50, 90, 40),
                "tokens": np.full(40, 20),
                "prefers": rng.random(40) > 0.5,
                "score": rng.normal(size=40),
                "length": np.full(40, 7.0),
            }
            for _ in range(2)
        ]
        for _ in range(2)
    )
    found = real_scores.summary(mine, naive)
    logs = [np.log(real_scores.summary([a], [a])["perplexity"][0]) for a in (*mine, *naive)]
    assert found["nats"][0] == pytest.approx((logs[0] + logs[1] - logs[2] - logs[3]) / 2)
    assert found["wins"][0] == pytest.approx(
        np.mean([(a["score"] > b["score"]).mean() for a, b in zip(mine, naive, strict=True)])
    )
    assert found["nats"][1] <= found["nats"][0] <= found["nats"][2] and found["length"] == 7


def test_a_round_that_was_not_measured_has_no_value_and_moves_no_other():
    tables = [
        [{"agent": "student", "round": t, "perplexity": 10.0 * t + seed} for t in (0, 3)]
        for seed in (0, 2)
    ]
    assert real_scores.by_round(tables, "student", "perplexity") == [1, None, None, 31]


# ---- everything, small ---------------------------------------------------------------------------


def test_end_to_end_between_calls(files, tmp_path, monkeypatch, capsys):
    root, words = tmp_path / "root", [f"--{name}={path}" for name, path in files.items()]
    monkeypatch.setattr(real, "work", functools.partial(real.work, run=in_process))
    monkeypatch.setattr(real_scores, "PLACE", tmp_path / "results")
    real.main([*words, f"--root={root}", "--seeds=0", "--minutes=0"])
    assert capsys.readouterr().out.endswith("6 of 6 left; the same command goes on\n")
    real.main([f"--root={root}", "--seeds=0", "--collect"])
    page = real_scores.section(json.loads((tmp_path / "results/real.json").read_text()), "")
    assert (
        page.count("Not measured: no run was finished.") == 3 and "bases are finished: none" in page
    )
    real.main([f"--root={root}", "--seeds=0"])
    assert capsys.readouterr().out.endswith("0 of 6 left\n")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.json")}
    real.main([f"--root={root}", "--seeds=0"])
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*.json")}, (
        "nothing is done again"
    )
    real.main([f"--root={root}", "--seeds=0", "--collect"])
    found = json.loads((tmp_path / "results/real.json").read_text())
    assert [row["name"] for row in found["experiments"]["main"]["rows"]] == [
        "naive SFT",
        "naive SFT continued",
        "ceiling: SFT on the truth",
        "MACPO",
        "confident loss",
    ]
    assert [row["name"] for row in found["experiments"]["noise"]["rows"]] == [
        "naive SFT",
        "0 %",
        "naive SFT, 50 %",
        "50 %",
    ]
    table = {
        row["label"]: row
        for row in json.loads(
            (root / "runs/helpful-controls=true-seed=0/eval/table.json").read_text()
        )["rows"]
    }
    mine = {row["name"]: row for row in found["experiments"]["main"]["rows"]}
    for name, label in (
        ("naive SFT", "student, round 0 (naive SFT)"),
        ("MACPO", "student, round 1"),
        ("ceiling: SFT on the truth", "ceiling"),
    ):
        assert mine[name]["perplexity"] == [pytest.approx(table[label]["perplexity"])]
        assert mine[name]["prefers"][0] == pytest.approx(table[label]["accuracy"])
        assert mine[name]["length"] == pytest.approx(table[label]["length"])
    assert (
        found["experiments"]["domain"]["rows"][0]["prefers"] == []
        and found["experiments"]["domain"]["rows"][0]["judge"] == "helpful"
    )
    page = real_scores.section(found, "What is said.\n")
    assert (
        "## Real files" in page
        and "MACPO" in page
        and "Alpaca: MACPO" in page
        and "nan" not in page
    )
    bases = found["bases"]["0"]
    assert {*bases} == {"strong", "weak1", "weak2", "weak3"} and bases["strong"]["counts"][
        "rows"
    ] > bases["weak1"]["counts"]["rows"]
    check_reward_slice(root)


def check_reward_slice(root: Path) -> None:
    """No prompt on which a reward model learned is in any slice or text of any run."""
    learned = {
        first_turn(pair)
        for (_, part), pairs in parts_on_disk(root).items()
        if part == "reward"
        for pair in pairs
    }
    seen = 0
    for run in (path.parent for path in root.glob("runs/*/config.toml")):
        for file in [*run.glob("data/slices/*.jsonl"), *run.glob("data/corpus_*/*.jsonl")]:
            for row in map(json.loads, file.read_text().splitlines()):
                assert (
                    next(m["content"] for m in row["prompt"] if m["role"] == "user") not in learned
                )
                seen += 1
    assert learned and seen > 100


def test_a_reward_model_of_pairs_that_the_run_has_seen_is_refused(tiny, tmp_path):
    pairs = [json.loads(line) for line in (tiny / "data/slices/d2.jsonl").read_text().splitlines()]
    known = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    write_rows(tmp_path / "known.jsonl", known)
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'known.jsonl'}")
    assert ended.code == 2 and "is one of the run's" in ended.err
    fresh = [
        row | {"prompt": [{"role": "user", "content": f"please {row['prompt'][0]['content']}"}]}
        for row in known
    ]
    long = fresh[0] | {"chosen": "who ? " * 200}
    write_rows(tmp_path / "fresh.jsonl", [*fresh[1:], long])
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'fresh.jsonl'}")
    assert ended.code == 0 and "1 pairs left out" in ended.out and "held-out accuracy" in ended.out
