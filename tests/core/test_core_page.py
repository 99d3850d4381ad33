"""The page docs/core.md does what it says, and core needs nothing of what lies above it."""

import re
import subprocess
import sys

from conftest import REPO

PAGE = (REPO / "docs/core.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_blocks_of_the_page_run_in_their_order(model_folder, capsys):
    code = "".join(BLOCKS)
    assert code.count('Path("runs/world/bases/strong")') == 1
    code = code.replace("runs/world/bases/strong", str(model_folder))
    names = {}

    exec(compile(code, "docs/core.md", "exec"), names)

    perplexities, counts, answers = capsys.readouterr().out.splitlines()[-3:]
    assert perplexities.startswith("[") and counts.startswith("{") and answers.startswith("[")
    assert len(BLOCKS) == 4 and len(names["tokens"]) == 2

    # Eight steps on one pair have made the chosen answer likelier, against the rejected one
    chosen, rejected = names["score"](names["model"], names["rows"], 4096)
    reference_chosen, reference_rejected = names["pair"].reference_logps
    assert chosen - rejected > reference_chosen - reference_rejected


def test_the_page_is_no_longer_than_a_page():
    assert sum(block.count("\n") for block in BLOCKS) <= 40


def test_core_and_kernels_import_nothing_of_a_run():
    modules = [
        f"minmacpo.{folder}.{file.stem}"
        for folder in ("core", "kernels")
        for file in (REPO / "minmacpo" / folder).glob("[a-z]*.py")
    ]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    ).stdout.split()
    for folder in ("pipeline", "method", "evaluation", "cli", "config"):
        assert not [name for name in loaded if name.startswith(f"minmacpo.{folder}")], folder
