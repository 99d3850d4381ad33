"""train.py starts once more with malloc's settings, as the same process with the same words, and only where that is safe."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from minmacpo.cli.heap import MARK, TUNABLES, tuned

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)
TOLD = "print(os.getpid(), os.environ.get('GLIBC_TUNABLES', '-'), sys.flags.utf8_mode, *sys.argv[1:], sep='|', flush=True)"
CODE = f"import os, sys\nfrom minmacpo.heap import start_again\n{TOLD}\nstart_again()\n{TOLD}\n"
POPPED = "import os\nos.environ.pop('GLIBC_TUNABLES', None)\n"


def environment(**changes) -> dict[str, str]:
    """That of the tests without what this is about, and some more."""
    mine = {
        name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", MARK)
    }
    return mine | {"PYTHONPATH": str(REPO)} | changes


def lines(*words, stdin="", **changes) -> list[list[str]]:
    """What a program prints, as lists of its parts."""
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=environment(**changes),
        input=stdin,
        check=True,
        timeout=60,
    )
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.fixture
def program(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    (place / "program.py").write_text(CODE)
    return place / "program.py"


def test_a_process_starts_again_in_its_own_place_with_its_own_words(program):
    first, second, third = lines("-X", "utf8", "-B", program, "a b", "--run.name=c", "")
    assert first[1:] == ["-", "1", "a b", "--run.name=c", ""], "before"
    assert second == third == [first[0], TUNABLES, *first[2:]], (
        "the same number, options and words, and only once more"
    )


def test_settings_of_ones_own_stay_and_win(program):
    assert (
        lines(program, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[1][1]
        == f"{TUNABLES}:glibc.malloc.hugetlb=0"
    )
    kept = lines(program, GLIBC_TUNABLES="glibc.malloc.tcache_count=3")
    assert [line[1] for line in kept] == ["glibc.malloc.tcache_count=3"] * 2, "not started again"


@pytest.mark.skipif(
    not Path("/lib64/ld-linux-x86-64.so.2").exists(),
    reason="only there it is known where the loader is",
)
@pytest.mark.parametrize(("own", "pages"), [("", "0x1"), (":glibc.malloc.hugetlb=0", "0x0")])
def test_the_loader_knows_these_settings_and_takes_the_last(own, pages):
    command = ["/lib64/ld-linux-x86-64.so.2", "--list-tunables"]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(GLIBC_TUNABLES=TUNABLES + own),
        timeout=60,
    ).stdout
    if "glibc.malloc.hugetlb" not in found:
        pytest.skip("glibc before 2.35")
    assert "glibc.malloc.tcache_count: 0x0 " in found and f"glibc.malloc.hugetlb: {pages} " in found


@pytest.mark.parametrize(
    "way", ["pipe", "a part of another program", "profiler", "module", "no such python"]
)
def test_what_could_not_go_on_is_not_started_again(way, program):
    gone = f"import sys; sys.executable = '/nowhere/python'\n{CODE}"
    if way == "no such python":
        program.write_text(gone)
    words = {
        "pipe": ["-"],
        "a part of another program": ["-c", f"import runpy; runpy.run_path({str(program)!r})"],
        "profiler": ["-m", "cProfile", program],
        "module": ["-m", "program"],
        "no such python": [program],
    }
    found = lines(*words[way], stdin=CODE, PYTHONPATH=f"{REPO}{os.pathsep}{program.parent}")
    told = [line for line in found if len(line) >= 3 and line[0].isdigit()]
    assert len(told) == 2 and {line[1] for line in told} == {"-"}


def test_where_the_settings_are_taken_away_it_starts_twice_and_no_more(program, tmp_path):
    """As the loader does for a python with rights of its own."""
    (tmp_path / "sitecustomize.py").write_text(POPPED)
    found = lines(program, PYTHONPATH=f"{REPO}{os.pathsep}{tmp_path}")
    assert len(found) == 3 and {line[1] for line in found} == {"-"}


def test_the_plan_knows_whether_they_are_in_force(monkeypatch):
    for found, known in ((TUNABLES, True), ("glibc.malloc.tcache_count=3", False), ("", False)):
        monkeypatch.setenv("GLIBC_TUNABLES", found)
        assert tuned() is known


def test_train_py_starts_again(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nopen({str(tmp_path / 'starts')!r}, 'a').write(os.environ.get('GLIBC_TUNABLES', '-') + '\\n')\n"
    )
    subprocess.run(
        [sys.executable, REPO / "train.py", "--help"],
        env=environment(PYTHONPATH=str(tmp_path)),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    assert (tmp_path / "starts").read_text().split() == ["-", TUNABLES]
