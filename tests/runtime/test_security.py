"""Hostile models, servers and folders: nothing they say acts on a terminal or a page, and no secret
is kept.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from runs import copy_run, invoke, train, write_stub
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
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(
    not BROWSER, reason="neither chromium nor google-chrome is installed"
)


def dom(file) -> str:
    """The page as a browser understands it, after its scripts and events."""
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    return subprocess.run(
        [*words, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    ).stdout


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
    assert names["style"] == 1 and names["meta"] == 3

    for _, attributes in elements:
        assert not {"autofocus", "src"} & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]
        # The page's own link, and nobody else's
        assert attributes.get("href", PAPER) == PAPER

    assert "<title>owned" not in shown and not {*ACTIVE} & {*shown}
    assert "\\u202e" in shown and "\\x1b" in shown and "&lt;script&gt;" in shown


@in_a_browser
def test_the_browser_would_have_run_the_hostile_text(tmp_path):
    (tmp_path / "page.html").write_text("<title>x</title><style>" + MARKUP.partition("<svg")[0])
    assert "<title>owned" in dom(tmp_path / "page.html")


def hostile_run(stub, place):
    """A copy of a finished run whose samples and pairs all are hostile, their hashes and checksums
    in order. Half of a surrogate pair is none of it: no file with one is read.
    """
    run, texts = copy_run(stub, place), [text.replace("\ud800", "") for text in OUTPUTS]
    for file in run.glob("*/*/stage.json"):
        for name in ("samples.jsonl", "pairs.jsonl", "d2.jsonl"):
            if not (data := file.with_name(name)).exists():
                continue
            rows = [json.loads(line) for line in data.read_text().splitlines()]
            for number, row in enumerate(rows):
                for key in {"response", "chosen", "rejected"} & row.keys():
                    row[key] = texts[(number + len(key)) % len(texts)]
                for message in row["prompt"][-1:]:
                    message["content"] = texts[number % len(texts)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            notes = json.loads(file.read_text())
            notes.pop("checksum")
            notes["files"][name] = describe(data)
            file.write_text(json.dumps(notes | {"checksum": fingerprint(notes)}))
    return run


@in_a_browser
def test_a_report_of_hostile_answers_is_inert_in_a_browser(stub, tmp_path):
    run = hostile_run(stub, tmp_path / "runs")
    write_report(run)
    check_inert(dom(run / "report.html"))


@in_a_browser
@pytest.mark.parametrize("frame", ["comparison.html", "experiment.html"])
def test_hostile_names_in_the_other_pages_are_inert_in_a_browser(tmp_path, frame):
    named = [*OUTPUTS, MARKUP]
    parts = dict.fromkeys(
        ("name", "question", "picture", "table", "values", "rounds", "seeds", "flags"), named
    )
    page = document(
        frame,
        **parts
        | {"table": [grid(named, [named]), tag("p", "x", title=MARKUP, class_=MARKUP + BIDI)]},
    )
    (tmp_path / "page.html").write_text(page)
    check_inert(dom(tmp_path / "page.html"))


@in_a_browser
def test_a_comparison_of_a_run_with_a_hostile_name_is_inert(stub, tmp_path):
    run = copy_run(stub, tmp_path / "runs")
    run = run.rename(
        run.with_name(
            "<script>document.title='owned'<!--script>\u202e\x1b[2J<img src=x onerror=alert(1)>"
        )
    )
    ended = invoke("eval", "compare", stub, run, f"--page={tmp_path / 'page.html'}")
    assert "\x1b" not in ended.out + ended.err and "\u202e" not in ended.out + ended.err
    assert ended.code == 0, ended.err
    check_inert(dom(tmp_path / "page.html"))


def test_a_page_may_load_and_run_nothing(stub):
    page = (stub / "report.html").read_text()
    assert (
        "Content-Security-Policy" in page
        and "default-src 'none'" in page
        and "script-src" not in page
    )


# ---- terminals ----------


def test_every_acting_character_is_shown_as_its_escape():
    shown = progress.escape_control_chars("".join(map(chr, (*range(0x3000), 0xD800, 0x1F642))))
    assert not {*ACTIVE} & {*shown} and {"\t", "\n", "é", "א", "🙂"} <= {*shown}
    assert not [
        c for c in map(chr, range(0xA0)) if c in shown and not c.isprintable() and c not in "\t\n"
    ]


def test_answers_on_a_terminal_are_inert(stub, monkeypatch):
    good = Sampler.__call__
    for text in OUTPUTS:

        def sampled(self, *args, text=text):
            return [replace(said, response=text) for said in good(self, *args)]

        monkeypatch.setattr(Sampler, "__call__", sampled)
        ended = invoke("sample", stub / "round1/student_pos", "hello")
        assert ended.code == 0 and not ({*ACTIVE} - {"\n"}) & {*ended.out}


def test_a_streamed_answer_is_inert_where_tokens_part_a_character(stub, capsys):
    text = "a\x1b]52;c;eA==\x07b\x9b2Jc\u202ed\x85e\u2066f"
    dialogue = scripted_dialogue(stub, text, StopGeneration())
    ids = dialogue.loaded.tokenizer.encode(text)
    assert len(ids) > len(text)  # several tokens to a character
    dialogue.reply("x")
    assert capsys.readouterr().out == progress.escape_control_chars(text) + "\n" and not {
        *ACTIVE
    } & {*progress.escape_control_chars(text)}


def test_errors_logs_tables_and_labels_are_inert(place, stub, monkeypatch, capsys):
    evil = "x\x1b]0;owned\x07\x9b2J\u202e"

    def fails(argv):
        raise UserError(evil)

    def misses(argv):
        raise FileNotFoundError(2, "no such file", evil)

    assert progress.run_main(fails) == progress.run_main(misses) == 2
    bar = progress.Progress(evil, 1, "step", 0, None)
    print(bar.desc)
    bar.close()
    said = capsys.readouterr()
    assert (
        not {*ACTIVE} & {*(said.out + said.err)}
        and said.err.count("\\x1b") >= 2
        and "\\x1b" in said.out
    )


def test_the_log_and_the_table_of_hostile_file_names_are_inert(place):
    (place / "hh").mkdir()
    rows = [
        json.dumps(
            {
                "prompt": f"what {i} \x1b[31m\x9b\u202e",
                "chosen": f"good {i} \x1b",
                "rejected": "no\x9b",
            }
        )
        for i in range(90)
    ]
    for name in ("a\x1b[2J\u202e.jsonl", "b\x9b.jsonl"):
        (place / "hh" / name).write_text("\n".join(rows).replace("what", name[:1]) + "\n")
    ended = train(
        write_stub(place / "p"), "--data.path=hh", "--run.name=hh", "--run.root=runs", *WORDS
    )
    told = (
        ended.out
        + ended.err
        + (place / "runs/hh/log.txt").read_text()
        + invoke("eval", place / "runs/hh").out
    )
    assert not {*ACTIVE} & {*told} and "\\x1b" in told


# ---- folders ----------


@pytest.mark.parametrize(
    "what", ["file", "stage", "round", "partial", "log.txt", "report.html.tmp"]
)
def test_a_link_out_of_a_run_is_refused(stub, place, what):
    run, out = copy_run(stub, place / "runs"), place / "out"
    out.mkdir()
    stage = run / "round1/student_pos"
    target = {
        "file": stage / "adapter_model.safetensors",
        "stage": stage,
        "round": stage.parent,
        "partial": run / ".partial",
    }.get(what, run / what)
    if target.exists():
        shutil.move(target, out / "moved")
    target.symlink_to(out / "moved")
    before = sorted(out.rglob("*"))
    for ended in (
        invoke("train", write_stub(place / "p"), f"--run.root={place / 'runs'}"),
        invoke("eval", run),
    ):
        assert (
            ended.code == 2
            and "is a link, which no run folder has" in ended.err
            and ended.err.count("\n") == 1
        )
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["../student_neg/stage.json", "/etc/passwd", "./stage.json", "link"]
)
def test_a_stage_names_no_file_but_its_own(stub, place, name):
    folder = copy_run(stub, place / "runs") / "round1/student_pos"
    (folder / "link").symlink_to("stage.json")
    notes = json.loads((folder / "stage.json").read_text())
    notes.pop("checksum")
    notes["files"][name] = next(iter(notes["files"].values()))
    if (folder / name).is_file():
        notes["files"][name] = describe(folder / name)
    (folder / "stage.json").write_text(json.dumps(notes | {"checksum": fingerprint(notes)}))
    with pytest.raises(UserError, match="missing"):
        verify(Stage(folder.name, folder, notes["fingerprint"]))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/../../x"])
def test_a_run_name_of_a_file_leads_nowhere_else(place, name):
    ended = invoke("train", write_stub(place / "p", extra=f'\n[run]\nname = "{name}"\n'))
    assert (
        ended.code == 2
        and ended.err.count("\n") == 1
        and sorted(p.name for p in place.iterdir()) == ["p"]
    )


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_malicious_pickle_is_not_read(stub, place):
    import pickle

    shutil.copytree(stub / "bases/strong", place / "model")
    (place / "model/model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (place / "model" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="pickle"):
        load_model(place / "model")
    (place / "model/model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load_model(place / "model")
    assert not (place / "exploded").exists()


# ---- secrets ----------


def no_key(place, *ended) -> None:
    written = "".join(
        file.read_text(errors="replace") for file in place.rglob("*") if file.is_file()
    )
    assert KEY not in written and all(KEY not in one.out + one.err for one in ended)


def test_a_key_that_the_server_sends_back_is_kept_nowhere(place, sides, quick):  # noqa: F811
    server = Server(
        [(400, f"Authorization: Bearer {KEY}")], reply=lambda body: f"You are Bearer {KEY}. [[A]]"
    )
    ended = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert ended.code == 0 and set(server.keys) == {f"Bearer {KEY}"}
    assert f"${remote.API_KEY}" in (place / "out/verdicts.jsonl").read_text()
    long = "x" * 180 + f" Authorization: Bearer {KEY}"  # cut within the key
    server.faults = [(401, long)]
    refused = invoke("eval", *sides[:-1], "--out=other", f"--url={server.url}", "--workers=1")
    assert refused.code == 2 and KEY[:6] not in refused.err
    no_key(place, ended, refused)


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
    assert ended.code == 2 and ended.err.count("\n") == 1 and remote.API_KEY in ended.err
    no_key(place, ended)
