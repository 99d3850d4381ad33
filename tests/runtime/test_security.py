"""Hostile models, servers and folders.

Nothing they say acts on a terminal or a page, and no secret is kept.
"""

import json
import os
import pickle
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import Ended, copy_run, invoke, rows_of, train, write_stub
from test_chat import scripted_dialogue
from test_judge import KEY, Server, quick, sides  # noqa: F401  fixtures
from test_programs import WORDS

from minmacpo import UserError
from minmacpo.cli.chat import StopGeneration
from minmacpo.core.checkpoint import load_model
from minmacpo.evaluation import remote_judge as remote
from minmacpo.evaluation.html import document, grid, tag
from minmacpo.evaluation.report import write_report
from minmacpo.pipeline.run import verify
from minmacpo.pipeline.sample_stage import Sampler
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime import progress
from minmacpo.runtime.files import describe, fingerprint

PAPER = "https://arxiv.org/abs/2410.07672"
BIDI = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ACTIVE = "\x00\x07\x08\r\x1b\x7f\x85\x9b\x9d" + BIDI + "\ud800"
MARKUP = (
    "</style></title></div></td><script>document.title='owned'</script>"
    '<img src=x onerror="document.title=\'owned\'">" onmouseover="x" '
    "' autofocus onfocus='document.title=1' <svg onload=document.title='owned'>"
    "<iframe src=javascript:1>$name ${style} &lt;b&gt;<base href=//evil>"
    "<meta http-equiv=refresh content=0;url=//evil><!-- ]]>"
)
OUTPUTS = [
    MARKUP,
    "before" + ACTIVE + "after",
    "x" * 100_000,
    "\x1b[2J\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil\x1b\\x",
    MARKUP + BIDI,
]
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
in_a_browser = pytest.mark.skipif(
    not BROWSER, reason="neither chromium nor google-chrome is installed"
)


def dom(file: Path) -> str:
    """The page as a browser understands it, after its scripts and events."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={file.parent / 'profile'}", "--dump-dom", file.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return ended.stdout


def active_in(text: str) -> set[str]:
    """The characters of a text that would act on a terminal."""
    return set(ACTIVE) & set(text)


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))


def check_inert(shown: str) -> None:
    """No element, attribute or acting character of OUTPUTS is in a page, and no script has run."""
    elements = Elements(shown).found
    names = Counter(name for name, _ in elements)
    assert not {"script", "img", "iframe", "base"} & names.keys()
    assert names["style"] == 1
    assert names["meta"] == 3

    for _, attributes in elements:
        assert not {"autofocus", "src"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        # The page's own link, and nobody else's
        assert attributes.get("href", PAPER) == PAPER

    assert "<title>owned" not in shown
    assert not active_in(shown)
    assert "\\u202e" in shown
    assert "\\x1b" in shown
    assert "&lt;script&gt;" in shown


@in_a_browser
def test_the_browser_would_have_run_the_hostile_text(tmp_path):
    (tmp_path / "page.html").write_text("<title>x</title><style>" + MARKUP.partition("<svg")[0])
    assert "<title>owned" in dom(tmp_path / "page.html")


def change_notes(file: Path, change: Callable[[dict], None]) -> dict:
    """Change what a stage.json says, its checksum in order; what it says then."""
    notes = json.loads(file.read_text())
    del notes["checksum"]
    change(notes)
    notes["checksum"] = fingerprint(notes)
    file.write_text(json.dumps(notes))
    return notes


def hostile_rows(file: Path) -> list[dict]:
    """The rows of a file of samples or pairs, every text of them hostile."""
    # No file with half of a surrogate pair is read
    texts = [text.replace("\ud800", "") for text in OUTPUTS]
    rows = rows_of(file)
    for number, row in enumerate(rows):
        for column in {"response", "chosen", "rejected"} & row.keys():
            row[column] = texts[(number + len(column)) % len(texts)]
        row["prompt"][-1]["content"] = texts[number % len(texts)]
    return rows


def hostile_run(stub: Path, root: Path) -> Path:
    """A copy of a finished run whose samples and pairs all are hostile, their hashes in order."""
    run = copy_run(stub, root)
    for pattern in ("*/*/samples.jsonl", "*/*/pairs.jsonl", "*/*/d2.jsonl"):
        for file in run.glob(pattern):
            rows = hostile_rows(file)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

            def list_anew(notes: dict, file: Path = file) -> None:
                notes["files"][file.name] = describe(file)

            change_notes(file.with_name("stage.json"), list_anew)
    return run


@in_a_browser
def test_a_report_of_hostile_answers_is_inert_in_a_browser(stub, tmp_path):
    run = hostile_run(stub, tmp_path / "runs")
    write_report(run)
    check_inert(dom(run / "report.html"))


@in_a_browser
@pytest.mark.parametrize("frame", ["comparison.html", "experiment.html"])
def test_hostile_names_in_the_other_pages_are_inert_in_a_browser(tmp_path, frame):
    texts = [*OUTPUTS, MARKUP]
    names = ("name", "question", "picture", "values", "rounds", "seeds", "flags")
    table = [grid(texts, [texts]), tag("p", "x", title=MARKUP, class_=MARKUP + BIDI)]
    page = document(frame, **dict.fromkeys(names, texts), table=table)
    (tmp_path / "page.html").write_text(page)
    check_inert(dom(tmp_path / "page.html"))


@in_a_browser
def test_a_comparison_of_a_run_with_a_hostile_name_is_inert(stub, tmp_path):
    name = "<script>document.title='owned'<!--script>\u202e\x1b[2J<img src=x onerror=alert(1)>"
    run = copy_run(stub, tmp_path / "runs")
    run = run.rename(run.with_name(name))
    page = tmp_path / "page.html"
    ended = invoke("eval", "compare", stub, run, f"--page={page}")
    assert ended.code == 0, ended.err
    for printed in (ended.out, ended.err):
        assert "\x1b" not in printed
        assert "\u202e" not in printed
    check_inert(dom(page))


def test_a_page_may_load_and_run_nothing(stub):
    page = (stub / "report.html").read_text()
    assert "Content-Security-Policy" in page
    assert "default-src 'none'" in page
    assert "script-src" not in page


# ---- terminals ----------


def test_every_acting_character_is_shown_as_its_escape():
    codes = [*range(0x3000), 0xD800, 0x1F642]
    shown = progress.escape_control_chars("".join(map(chr, codes)))
    assert not active_in(shown)
    assert {"\t", "\n", "é", "א", "🙂"} <= set(shown)
    for code in range(0xA0):
        character = chr(code)
        if not character.isprintable() and character not in "\t\n":
            assert character not in shown


@pytest.mark.parametrize("text", OUTPUTS, ids=range(len(OUTPUTS)))
def test_answers_on_a_terminal_are_inert(stub, monkeypatch, text):
    generate = Sampler.__call__

    def hostile(self, *args):
        return [replace(sample, response=text) for sample in generate(self, *args)]

    monkeypatch.setattr(Sampler, "__call__", hostile)
    ended = invoke("sample", stub / "round1/student_pos", "hello")
    assert ended.code == 0
    assert not active_in(ended.out)


def test_a_streamed_answer_is_inert_where_tokens_part_a_character(stub, capsys):
    text = "a\x1b]52;c;eA==\x07b\x9b2Jc\u202ed\x85e\u2066f"
    dialogue = scripted_dialogue(stub, text, StopGeneration())
    ids = dialogue.loaded.tokenizer.encode(text)
    assert len(ids) > len(text)  # several tokens to a character
    dialogue.reply("x")
    printed = capsys.readouterr().out
    assert printed == progress.escape_control_chars(text) + "\n"
    assert not active_in(printed)


def test_errors_and_labels_are_inert(capsys):
    hostile = "x\x1b]0;owned\x07\x9b2J\u202e"

    def fail(argv):
        raise UserError(hostile)

    def miss(argv):
        raise FileNotFoundError(2, "no such file", hostile)

    assert progress.run_main(fail) == 2
    assert progress.run_main(miss) == 2
    bar = progress.Progress(hostile, 1, "step", 0, None)
    print(bar.desc)
    bar.close()
    printed = capsys.readouterr()
    assert not active_in(printed.out)
    assert not active_in(printed.err)
    assert printed.err.count("\\x1b") >= 2
    assert "\\x1b" in printed.out


def test_the_log_and_the_table_of_hostile_file_names_are_inert(place):
    folder = place / "hh"
    folder.mkdir()
    for name, word in (("a\x1b[2J\u202e.jsonl", "a"), ("b\x9b.jsonl", "b")):
        rows = []
        for i in range(90):
            prompt = f"{word} {i} \x1b[31m\x9b\u202e"
            rows.append({"prompt": prompt, "chosen": f"good {i} \x1b", "rejected": "no\x9b"})
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, "--data.path=hh", "--run.name=hh", "--run.root=runs"]
    ended = train(write_stub(place / "p"), *words)
    log = (place / "runs/hh/log.txt").read_text()
    table = invoke("eval", place / "runs/hh").out
    everything = ended.out + ended.err + log + table
    assert not active_in(everything)
    assert "\\x1b" in everything


# ---- folders ----------


@pytest.mark.parametrize(
    "what", ["file", "stage", "round", "partial", "log.txt", "report.html.tmp"]
)
def test_a_link_out_of_a_run_is_refused(stub, place, what):
    run = copy_run(stub, place / "runs")
    outside = place / "out"
    outside.mkdir()
    stage = run / "round1/student_pos"
    links = {
        "file": stage / "adapter_model.safetensors",
        "stage": stage,
        "round": stage.parent,
        "partial": run / ".partial",
        "log.txt": run / "log.txt",
        "report.html.tmp": run / "report.html.tmp",
    }
    link = links[what]
    if link.exists():
        shutil.move(link, outside / "moved")
    link.symlink_to(outside / "moved")
    before = sorted(outside.rglob("*"))
    preset = write_stub(place / "p")
    for words in (["train", preset, f"--run.root={place / 'runs'}"], ["eval", run]):
        ended = invoke(*words)
        assert ended.code == 2
        assert "is a link, which no run folder has" in ended.err
        assert ended.err.count("\n") == 1
    assert sorted(outside.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["../student_neg/stage.json", "/etc/passwd", "./stage.json", "link"]
)
def test_a_stage_names_no_file_but_its_own(stub, place, name):
    folder = copy_run(stub, place / "runs") / "round1/student_pos"
    (folder / "link").symlink_to("stage.json")

    def name_another(notes: dict) -> None:
        known = next(iter(notes["files"].values()))
        is_there = (folder / name).is_file()
        notes["files"][name] = describe(folder / name) if is_there else known

    notes = change_notes(folder / "stage.json", name_another)
    with pytest.raises(UserError, match="missing"):
        verify(Stage(folder.name, folder, notes["fingerprint"]))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/../../x"])
def test_a_run_name_of_a_file_leads_nowhere_else(place, name):
    ended = invoke("train", write_stub(place / "p", extra=f'\n[run]\nname = "{name}"\n'))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["p"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_malicious_pickle_is_not_read(stub, place):
    model = place / "model"
    shutil.copytree(stub / "bases/strong", model)
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="pickle"):
        load_model(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load_model(model)
    assert not (place / "exploded").exists()


# ---- secrets ----------


def check_no_key(place: Path, *programs: Ended) -> None:
    """The key is in no file here, and in nothing that the programs have printed."""
    for file in place.rglob("*"):
        if file.is_file():
            assert KEY not in file.read_text(errors="replace"), file
    for ended in programs:
        assert KEY not in ended.out
        assert KEY not in ended.err


def test_a_key_that_the_server_sends_back_is_kept_nowhere(place, sides, quick):  # noqa: F811
    fault = (400, f"Authorization: Bearer {KEY}")
    server = Server([fault], reply=lambda body: f"You are Bearer {KEY}. [[A]]")
    ended = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert ended.code == 0
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert f"${remote.API_KEY}" in (place / "out/verdicts.jsonl").read_text()

    long = "x" * 180 + f" Authorization: Bearer {KEY}"  # cut within the key
    server.faults = [(401, long)]
    refused = invoke("eval", *sides[:-1], "--out=other", f"--url={server.url}", "--workers=1")
    assert refused.code == 2
    assert KEY[:6] not in refused.err
    check_no_key(place, ended, refused)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:{}@127.0.0.1:1/v1",
        "http://127.0.0.1:1/v1?key={}",
        "ftp://x:{}@h",
        "http://h:1/#{}",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_shown(place, sides, quick, url):  # noqa: F811
    ended = invoke("eval", *sides, "--url=" + url.format(KEY))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert remote.API_KEY in ended.err
    check_no_key(place, ended)
