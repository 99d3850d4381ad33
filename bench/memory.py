"""Predicted against measured peak memory of whole stages: python -m bench.memory [SHAPE...], prints a table.

Makes a small run with the strong base of each SHAPE (world, 15M, 110M), then computes one stage of each kind again in a
process of its own (`train.py --stage`), and compares the peak of that process with what `--dry_run` says of it. The
second measurement makes glibc give every block above 1 MB back at once: without it, freed blocks stay and do not always
fit what comes next, so that a process holds more than all of its tensors together.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).parent.parent
LARGE = ["--data.max_length=192", "--data.max_prompt=96", "--generate.max_new=96", "--generate.batch=32", "--model.context=256",
         "--pretrain.strong_steps=2", "--pretrain.weak_steps=2", "--world.d1=32", "--world.d2=64", "--world.test=16"]  # fmt: skip
SHAPES = {
    "world": ["--pretrain.strong_steps=20", "--pretrain.weak_steps=20"],
    "15M": ["--model.strong=288x6x6x768", "--model.weak=96x3x3x256", *LARGE],
    "110M": ["--model.strong=768x12x12x2048", "--model.weak=96x3x3x256", *LARGE, "--pretrain.batch=8", "--sft.batch=16"],
}
STAGES = ["bases/strong", "round0/student_pos", "round1/student_pos", "round1/positives_student", "round1/reference_student"]


def program(words: list[str], **environment: str) -> str:
    """What train.py prints; ends here where it fails."""
    command = [sys.executable, str(HOME / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def compare(name: str, root: Path) -> None:
    """A line for every stage of a shape."""
    words = [*SHAPES[name], "--macpo.teachers=1", "--macpo.rounds=1", "--macpo.controls=false", f"--run.root={root}", f"--run.name={name}"]
    program(words)
    for stage in STAGES:
        shutil.rmtree(root / name / stage)
        (root / name / "eval/table.json").unlink(missing_ok=True)
        [line] = [line for line in program([*words, "--dry_run"]).splitlines() if f" {stage} " in line]
        told = float(re.search(r"([\d.]+) (MB|GB)$", line)[1]) * (1024 if line.endswith("GB") else 1)
        found = []
        for environment in ({}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}):
            shutil.rmtree(root / name / stage, ignore_errors=True)
            program([*words, f"--stage={stage}"], **environment)
            notes = json.loads((root / name / stage / "stage.json").read_text())
            found.append(f"{notes['peak_mb']:5} MB ({told / notes['peak_mb'] - 1:+.0%})")
        print(f"{name:6} {stage:26} {notes['kind']:11} predicted {told:5.0f} MB, measured {found[0]}, blocks given back {found[1]}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        for shape in sys.argv[1:] or SHAPES:
            compare(shape, Path(root))
