"""What the fault suite starts from: a run as small as a whole run can be."""

from pathlib import Path

import pytest
from runs import write_stub

pytest.register_assert_rewrite("forks")
from forks import fork  # noqa: E402

# The stub made smaller: one teacher, one round, a few prompts, one optimiser step a stage, its state saved after it.
SMALL = """--macpo.teachers=1 --macpo.rounds=1 --macpo.controls=false --pretrain.strong_steps=1 --pretrain.weak_steps=1 --pretrain.batch=100 --world.d1=4
--world.d2=6 --world.test=4 --sft.batch=8 --dpo.batch=8 --generate.max_new=4 --generate.batch=4 --eval.bootstrap=2
--run.save_every=1 --run.log_every=1 --run.micro_tokens=100000 --run.threads=1""".split()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[list[str], Path]:
    """(the words of a small run, but for its root; a finished one, not to be changed)."""
    root = tmp_path_factory.mktemp("small")
    words = [write_stub(root), "--run.name=small", *SMALL]
    ended, _ = fork("train", [*words, f"--run.root={root}"], reports=True)
    assert ended.code == 0, ended.err
    return words, root / "small"
