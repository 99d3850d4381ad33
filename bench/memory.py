"""Predicted against measured peak memory of whole stages: python -m bench.memory [SHAPE[:DTYPE[:FORM]]...], prints a table.

Makes a small run with the strong base of each SHAPE (world, 15M, 110M; DTYPE as run.dtype, FORM as model.quantize: 15M:bfloat16:nf4),
then computes one stage of each kind again in a process of its own (`train.py --stage`), and compares the peak of that process
with what `--dry_run` says of it.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path

from bench.measure import words

HOME = Path(__file__).parent.parent
LARGE = [
    "--data.max_length=192",
    "--data.max_prompt_length=96",
    "--generate.max_new_tokens=96",
    "--generate.batch=32",
    "--model.context=256",
    "--pretrain.strong_steps=12",
    "--pretrain.weak_steps=2",
    "--world.d1=32",
    "--world.d2=64",
    "--world.test=16",
]
SHAPES = {
    "world": [
        "--pretrain.strong_steps=100",
        "--pretrain.weak_steps=20",
    ],  # what is free in glibc's heap grows for as long
    "15M": ["--model.strong=288x6x6x768", "--model.weak=96x3x3x256", *LARGE],
    "110M": [
        "--model.strong=768x12x12x2048",
        "--model.weak=96x3x3x256",
        *LARGE,
        "--pretrain.batch=8",
        "--sft.batch=16",
    ],
}
STAGES = [
    "bases/strong",
    "round0/student_pos",
    "round1/student_pos",
    "round1/positives_student",
    "round1/reference_student",
]


def program(words: list[str]) -> str:
    """What train.py prints; ends here where it fails."""
    command = [sys.executable, str(HOME / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def compare(case: str, root: Path) -> None:
    """A line for every stage of a shape."""
    shape, dtype, form = (
        part or usual for part, usual in zip_longest(case.split(":"), ("", "float32", "none"))
    )
    name = case.replace(":", "-")
    words = [
        *SHAPES[shape],
        f"--run.dtype={dtype}",
        f"--model.quantize={form}",
        "--macpo.teachers=1",
        "--macpo.rounds=1",
        "--macpo.controls=false",
        f"--run.root={root}",
        f"--run.name={name}",
    ]
    program(words)
    for stage in STAGES:
        shutil.rmtree(root / name / stage)
        (root / name / "eval/table.json").unlink(missing_ok=True)
        [line] = [
            line for line in program([*words, "--dry_run"]).splitlines() if f" {stage} " in line
        ]
        told = float(re.search(r"([\d.]+) (MB|GB)$", line)[1]) * (
            1024 if line.endswith("GB") else 1
        )
        program([*words, f"--stage={stage}"])
        notes = json.loads((root / name / stage / "stage.json").read_text())
        measured = (
            notes.get("peak_gpu_mb") or notes["peak_mb"]
        )  # what is planned is the memory of the device
        print(
            f"{case:18} {stage:26} {notes['kind']:11} predicted {told:5.0f} MB, measured {measured:5} MB ({told / measured - 1:+.0%})",
            flush=True,
        )


if __name__ == "__main__":
    if strange := [word for word in words() if word.partition(":")[0] not in SHAPES]:
        sys.exit(f"{__doc__}\nerror: {strange[0]} is no shape; known: {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as root:
        for shape in words() or SHAPES:
            compare(shape, Path(root))
