"""train.py starts once more with malloc's settings, as the same process with the same words, and only where that is safe."""

import os
import subprocess
import sys

import pytest
from conftest import REPO

from minmacpo.heap import TUNABLES

pytestmark = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="only glibc has these settings")
TOLD = "print(os.getpid(), os.environ.get('GLIBC_TUNABLES', '-'), *sys.argv[1:], sep='|', flush=True)"
CODE = f"import os, sys\nfrom minmacpo.heap import start_again\n{TOLD}\nstart_again()\n{TOLD}\n"


def lines(*words, tunables=None, stdin=""):
    """What a program prints, as lists of its parts; GLIBC_TUNABLES as given."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"PYTHONPATH": str(REPO)} | ({"GLIBC_TUNABLES": tunables} if tunables else {})
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, input=stdin, check=True)
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.fixture
def program(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    (place / "program.py").write_text(CODE)
    return place / "program.py"


def test_a_process_starts_again_in_its_own_place_with_its_own_words(program):
    first, second, third = lines("-B", program, "a b", "--run.name=c", "")
    assert first[1:] == ["-", "a b", "--run.name=c", ""], "before"
    assert second == third == [first[0], TUNABLES, *first[2:]], "the same number and words, and only once more"


def test_settings_of_ones_own_stay_and_win(program):
    assert lines(program, tunables="glibc.malloc.check=0")[1][1] == f"glibc.malloc.check=0:{TUNABLES}"
    kept = lines(program, tunables="glibc.malloc.tcache_count=3")
    assert [line[1] for line in kept] == ["glibc.malloc.tcache_count=3"] * 2, "not started again"


TRACED = "import sys; sys.settrace(lambda *_: None); sys.argv[:] = sys.orig_argv[-1:]  # as if these words were its own\n"


@pytest.mark.parametrize("way", [["-"], ["-c", "import runpy; runpy.run_path({0!r})"], ["-c", TRACED + CODE]])
def test_what_could_not_go_on_is_not_started_again(way, program):
    """Its words have been read from a pipe, it is a part of another program, or somebody steps through it."""
    found = lines(*(word.format(str(program)) for word in way), stdin=f"import runpy; runpy.run_path({str(program)!r})")
    assert len(found) == 2 and {line[1] for line in found} == {"-"}


def test_train_py_starts_again(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import os\nopen({str(tmp_path / 'starts')!r}, 'a').write(os.environ.get('GLIBC_TUNABLES', '-') + '\\n')\n")
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, REPO / "train.py", "--help"], env=env, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "starts").read_text().split() == ["-", TUNABLES]
