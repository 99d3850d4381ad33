"""The benchmark on real files: its split, its jobs in limited time, and all of it made small."""

import functools
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from runs import invoke

from bench.results import page, real, real_page, real_plan, real_scores, store
from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.data.formats import read_data
from minmacpo.data.records import Message, Pair
from minmacpo.data.splits import first_turn
from minmacpo.evaluation.experiments import run_process
from minmacpo.runtime.files import write_rows

# Like bench/results/real.toml, of models that can do nothing
SMALL = """
seeds = [0, 1]
most = { d1 = 12, d2 = 12, test = 10 }
full = ""
flags = '''@hh-real --macpo.controls=false --run.max_tokens_per_batch=400
--data.max_prompt_length=120 --data.max_length=160 --model.context=160 --model.vocab=330
--model.strong=16x1x2x32 --model.weak=8x1x2x16,16x1x2x16
--pretrain.strong_steps=3 --pretrain.weak_steps=2 --pretrain.batch=8 --lora.targets=q_proj
--generate.max_new_tokens=8 --macpo.rounds=1 --eval.bootstrap=20'''
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
WORDS = (
    "why do small birds sing loud songs near old green trees every early morning "
    "when nobody wants to hear them"
).split()


def rows_of_hh(seed: int, count: int, about: str) -> list[dict]:
    """Made-up rows of HH-RLHF's kind; some prompts are there twice, some have three turns."""
    rng = random.Random(f"{seed}/{about}")

    def words(least: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(least, least + 5)))

    rows = []
    for i in range(count):
        number = i // 2 if i % 5 == 0 else i
        prompt = f"\n\nHuman: {about} {number} {words(2)}"
        if i % 3 == 0:
            prompt += f"\n\nAssistant: {words(2)}\n\nHuman: {words(2)}"
        chosen = f"{prompt}\n\nAssistant: {words(4)}"
        rejected = f"{prompt}\n\nAssistant: {words(1)} !"
        rows.append({"chosen": chosen, "rejected": rejected})
        if i % 7 == 0:
            rows.append({"chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture
def files(tmp_path, seed, monkeypatch) -> dict[str, str]:
    """HH files, one for Alpaca, and the small plan in the place of the real one."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan/real.toml").write_text(SMALL, "utf-8")
    monkeypatch.setattr(real_plan, "HERE", tmp_path / "plan")
    for name in ("helpful", "harmless"):
        write_rows(tmp_path / f"{name}.jsonl", rows_of_hh(seed, 90, name))
    instructions = []
    for i in range(60):
        hint = "" if i % 2 else "quickly"
        row = {"instruction": f"name bird {i}", "input": hint, "output": f"bird {i} sings"}
        instructions.append(row)
    (tmp_path / "alpaca.json").write_text(json.dumps(instructions))
    return {
        "helpful": str(tmp_path / "helpful.jsonl"),
        "harmless": str(tmp_path / "harmless.jsonl"),
        "alpaca": str(tmp_path / "alpaca.json"),
    }


def run_here(command: list[str], end: float = 0) -> tuple[int, str]:
    """A job without a process of its own."""
    if command[1] == "-m":
        return real.main(command[3:]), ""
    ended = invoke("train", *command[2:])
    return ended.code, ended.err


# ---- the split ------------------------------------------------------------------------------


def parts_on_disk(root: Path) -> dict[tuple[str, str], list[Pair]]:
    """What the split wrote."""
    parts = {}
    for file in root.glob("data/*/*.jsonl"):
        if file.stat().st_size:
            parts[file.parent.name, file.stem], _ = read_data(str(file))
    return parts


def test_splits_share_no_first_turn_and_split_json_counts_them(files, tmp_path):
    plan = real_plan.read_plan(tmp_path / "root", False)
    real.split(plan, files)
    parts = parts_on_disk(plan.root)

    split_of_turn = {}
    for (_, part), pairs in parts.items():
        for pair in pairs:
            assert split_of_turn.setdefault(first_turn(pair), part) == part
    assert {part for _, part in parts} == set(real_plan.PARTS)

    counts = plan.counts()["rows"]
    for (source, part), pairs in parts.items():
        assert counts[source][part] == len(pairs)
    assert counts["helpful"]["d1"] <= 12
    assert counts["helpful"]["test"] <= 10
    assert counts["alpaca"]["reward"] == 0


def test_a_turn_that_two_sources_have_goes_to_one_split():
    def pairs(source: str) -> list[Pair]:
        rows = []
        for i in range(100):
            prompt = (Message("user", f"q {i}"),)
            rows.append(Pair(f"{source}{i}", prompt, f"yes {source} {i}", "no"))
        return rows

    even = [0.2] * 5
    parts = real.divide({"a": pairs("a"), "b": pairs("b")}, {"a": even, "b": even}, {})
    for part in real_plan.PARTS:
        turns_of_a = {first_turn(pair) for pair in parts["a", part]}
        turns_of_b = {first_turn(pair) for pair in parts["b", part]}
        assert len(turns_of_a) == 20
        if part in ("d2", "test"):
            assert not turns_of_b, "a prompt of D2 and test occurs once"
        else:
            assert turns_of_b == turns_of_a


def test_a_turn_in_two_splits_is_caught():
    pair = Pair("a", (Message("user", "why"),), "so", "no")

    with pytest.raises(AssertionError, match="in common"):
        real.check_disjoint({("helpful", "test"): [pair], ("pku", "reward"): [pair]})


def test_the_split_is_made_once_and_other_files_are_refused(files, tmp_path):
    plan = real_plan.read_plan(tmp_path / "root", False)
    with pytest.raises(UserError, match="--harmless"):
        real.split(plan, {"helpful": files["helpful"]})

    real.split(plan, files)
    before = {file: file.stat().st_mtime_ns for file in plan.root.glob("data/*/*")}
    real.split(plan, {})
    real.split(plan, files)
    assert before == {file: file.stat().st_mtime_ns for file in plan.root.glob("data/*/*")}

    with pytest.raises(UserError, match="other files"):
        real.split(plan, files | {"helpful": files["harmless"]})


# ---- jobs -----------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a job says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def jobs_in(folder: Path, count: int) -> list[real.Job]:
    """So many jobs, each of which is to write a file."""
    files = [folder / str(i) for i in range(count)]
    return [real.Job(f"job {file.name}", [str(file)], (file,)) for file in files]


def test_a_call_ends_in_time_and_the_next_one_goes_on(tmp_path):
    clock = Clock()
    started = []

    def run(command, end):
        """Three minutes a job; what would last longer than the call is asked to end."""
        started.append(Path(command[0]).name)
        if clock.now + 180 > end:
            clock.now = end
            return 143, ""
        clock.now += 180
        Path(command[0]).write_text("done")
        return 0, ""

    jobs = jobs_in(tmp_path, 5)
    for finished in (2, 4, 5):
        left = [job for job in jobs if not job.finished]
        before = clock.now
        assert real.work(left, 480, run, clock) == finished - (5 - len(left))
        assert clock.now - before <= 480
    assert started == ["0", "1", "2", "2", "3", "4", "4"]


@pytest.mark.parametrize(
    ("code", "errors", "says"),
    [
        (2, "error: no room\n", "job 0: exit 2: error: no room"),
        (0, "", "job 0: exit 0"),
        (143, "", "exit 143"),
    ],
)
def test_a_job_that_fails_or_leaves_nothing_ends_the_call(tmp_path, code, errors, says):
    def run(command, end):
        return code, errors

    with pytest.raises(UserError, match=says):
        real.work(jobs_in(tmp_path, 2), 480, run, Clock())


def test_a_process_is_asked_to_end_when_its_time_is_up():
    code, _ = run_process(["sleep", "60"], time.monotonic() + 0.3)

    assert code in real.STOPPED


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("seed_of_runs", [0, 1])
def test_every_case_of_the_real_plan_can_be_parsed_and_runs_once(
    tmp_path, monkeypatch, full, seed_of_runs
):
    plan = real_plan.read_plan(tmp_path, full)
    every_file = {"files": dict.fromkeys(real_plan.SOURCES)}
    monkeypatch.setattr(real_plan.Plan, "counts", lambda self: every_file)
    assert {*plan.experiments} == {"main", "teachers", "noise", "domain", "rounds"}

    runs = plan.runs(seed_of_runs)
    assert len(runs) == 14
    for case in runs.values():
        config = parse(plan.words_of(case, seed_of_runs)).config
        assert len(config.model.teachers) == config.macpo.teachers
        assert config.data.shares[1] == 1
    plan.config(seed_of_runs, "bases", ["--data.path=x"])


def test_the_real_plan_names_rows_of_the_world_that_are_there(tmp_path):
    plan = real_plan.read_plan(tmp_path, False)

    for experiment in plan.experiments.values():
        for file, group, name in experiment["world"].values():
            variants = store.read_result(file, REPO / store.PLACE)["variants"]
            assert (group, name) in [(row.get("group", ""), row["name"]) for row in variants]
    for shares in plan.settings["shares"].values():
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1)


def test_without_a_file_its_experiment_is_left_out(files, tmp_path):
    plan = real_plan.read_plan(tmp_path / "root", False)
    real.split(plan, {name: files[name] for name in ("helpful", "harmless")})
    assert not [name for name in plan.runs(0) if "alpaca" in name]

    empty = {"question": "Elsewhere?", "world": {}, "rows": [], "missing": ["alpaca"], "wanted": 1}
    text = real_page.experiment_text("domain", empty)
    assert "Not measured: no file of alpaca was given." in text


# ---- what is printed ------------------------------------------------------------------------


def test_the_page_of_results_is_what_its_command_makes(monkeypatch):
    monkeypatch.chdir(REPO)

    assert page.page() == (REPO / "RESULTS.md").read_text("utf-8")
    assert page.readme_table() in (REPO / "README.md").read_text("utf-8")


def a_row(trust: list[float]) -> dict:
    """A row of the table; `trust`: accuracy of the reward model with its interval."""
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
    ("trust", "is_informative"),
    [
        ([0.58, 0.53, 0.63], True),
        ([0.52, 0.49, 0.55], False),
        ([0.5, 0.5, 0.5], False),
        ([0.4, 0.3, 0.45], True),
    ],
)
def test_not_informative_stands_beside_a_score_whose_judge_may_be_guessing(trust, is_informative):
    text = " ".join(real_page.cells({}, a_row(trust)))

    assert ("not informative" not in text) == is_informative
    assert f"{trust[0]:.2f}" in text


def test_intervals_and_differences_are_those_of_the_arrays(seed):
    rng = np.random.default_rng(seed)

    def random_arrays() -> real_scores.Arrays:
        return {
            "logp": -rng.uniform(50, 90, 40),
            "tokens": np.full(40, 20),
            "prefers": rng.random(40) > 0.5,
            "score": rng.normal(size=40),
            "length": np.full(40, 7.0),
        }

    def log_perplexity(arrays: real_scores.Arrays) -> float:
        return -arrays["logp"].sum() / arrays["tokens"].sum()

    naive = [random_arrays(), random_arrays()]
    agent = [random_arrays(), random_arrays()]
    row = real_scores.summary(agent, naive)

    nats = [log_perplexity(a) - log_perplexity(b) for a, b in zip(agent, naive, strict=True)]
    assert row["nats"][0] == pytest.approx(np.mean(nats))
    assert row["nats"][1] <= row["nats"][0] <= row["nats"][2]
    won = [(a["score"] > b["score"]).mean() for a, b in zip(agent, naive, strict=True)]
    assert row["wins"][0] == pytest.approx(np.mean(won))
    assert row["length"] == 7


def test_a_round_that_was_not_measured_has_no_value_and_moves_no_other():
    tables = []
    for seed in (0, 2):
        rows = [{"agent": "student", "round": t, "perplexity": 10.0 * t + seed} for t in (0, 3)]
        tables.append(rows)

    assert real_scores.by_round(tables, "student", "perplexity") == [1, None, None, 31]


# ---- everything, small ----------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end_between_calls(files, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    results = tmp_path / "results/real.json"
    words = [f"--{name}={path}" for name, path in files.items()]
    monkeypatch.setattr(real, "work", functools.partial(real.work, run=run_here))
    monkeypatch.setattr(real_scores, "PLACE", tmp_path / "results")

    # A first call that has no time, and the page of nothing
    real.main([*words, f"--root={root}", "--seeds=0", "--minutes=0"])
    assert capsys.readouterr().out.endswith("6 of 6 left; the same command goes on\n")
    real.main([f"--root={root}", "--seeds=0", "--collect"])
    text = real_page.section(json.loads(results.read_text()), "")
    assert text.count("Not measured: no run was finished.") == 3
    assert "bases are finished: none" in text

    # A call that does everything, and one that finds nothing to do
    real.main([f"--root={root}", "--seeds=0"])
    assert capsys.readouterr().out.endswith("0 of 6 left\n")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.json")}
    real.main([f"--root={root}", "--seeds=0"])
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*.json")}

    real.main([f"--root={root}", "--seeds=0", "--collect"])
    collected = json.loads(results.read_text())
    check_collected(collected, root / "runs/helpful-controls=true-seed=0")
    text = real_page.section(collected, "What the finding is.\n")
    assert "## Real files" in text
    assert "MACPO" in text
    assert "Alpaca: MACPO" in text
    assert "nan" not in text
    check_reward_split(root)


def check_collected(collected: dict, main_run: Path) -> None:
    """The numbers of the page are those of the runs."""
    rows_of = {name: part["rows"] for name, part in collected["experiments"].items()}
    assert [row["name"] for row in rows_of["main"]] == [
        "naive SFT",
        "naive SFT continued",
        "ceiling: SFT on the truth",
        "MACPO",
        "confident loss",
    ]
    noise = ["naive SFT", "0 %", "naive SFT, 50 %", "50 %"]
    assert [row["name"] for row in rows_of["noise"]] == noise
    assert rows_of["domain"][0]["prefers"] == []
    assert rows_of["domain"][0]["judge"] == "helpful"

    table = json.loads((main_run / "eval/table.json").read_text())["rows"]
    row_of_label = {row["label"]: row for row in table}
    row_of_name = {row["name"]: row for row in rows_of["main"]}
    for name, label in (
        ("naive SFT", "student, round 0 (naive SFT)"),
        ("MACPO", "student, round 1"),
        ("ceiling: SFT on the truth", "ceiling"),
    ):
        row = row_of_name[name]
        expected = row_of_label[label]
        assert row["perplexity"] == [pytest.approx(expected["perplexity"])]
        assert row["prefers"][0] == pytest.approx(expected["accuracy"])
        assert row["length"] == pytest.approx(expected["length"])

    bases = collected["bases"]["0"]
    assert {*bases} == {"strong", "weak1", "weak2", "weak3"}
    assert bases["strong"]["counts"]["rows"] > bases["weak1"]["counts"]["rows"]


def check_reward_split(root: Path) -> None:
    """No prompt on which a reward model learned is in any split or text of any run."""
    learned = set()
    for (_, part), pairs in parts_on_disk(root).items():
        if part == "reward":
            learned |= {first_turn(pair) for pair in pairs}
    assert learned

    texts = [*root.glob("runs/*/data/slices/*.jsonl"), *root.glob("runs/*/data/corpus_*/*.jsonl")]
    rows = 0
    for file in texts:
        for line in file.read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            turns = [message["content"] for message in prompt if message["role"] == "user"]
            assert turns[0] not in learned
            rows += 1
    assert rows > 100


def test_a_reward_model_of_pairs_that_the_run_has_seen_is_refused(tiny, tmp_path):
    lines = (tiny / "data/slices/d2.jsonl").read_text().splitlines()
    seen = []
    for line in lines:
        pair = json.loads(line)
        seen.append({name: pair[name] for name in ("prompt", "chosen", "rejected")})
    write_rows(tmp_path / "seen.jsonl", seen)
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'seen.jsonl'}")
    assert ended.code == 2
    assert "is one of the run's" in ended.err

    fresh = []
    for row in seen:
        question = f"please {row['prompt'][0]['content']}"
        fresh.append(row | {"prompt": [{"role": "user", "content": question}]})
    too_long = fresh[0] | {"chosen": "who ? " * 200}
    write_rows(tmp_path / "fresh.jsonl", [*fresh[1:], too_long])
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'fresh.jsonl'}")
    assert ended.code == 0
    assert "1 pairs left out" in ended.out
    assert "held-out accuracy" in ended.out
