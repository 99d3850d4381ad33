"""The tables of docs/data.md, "which file can I bring?", say what the readers do.

They are made here. If a table is out of date, the failing test prints it as it should be.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import REPO
from test_file_kinds import FILES
from test_formats import FORMATS, GOOD, INVALID_FIRST, UNUSABLE, A, Q, as_messages
from texts import write_lines

from minmacpo import UserError
from minmacpo.data.columns import HARMLESS
from minmacpo.data.formats import parse_row, read_data

PAGE = (REPO / "docs/data.md").read_text(encoding="utf-8")

YES = {"role": "assistant", "content": "yes"}

# What a row holds, as the page says it, and such a row
READ = {
    "`chosen`, `rejected`: HH-RLHF texts": FORMATS["HH-RLHF"][0],
    "`chosen`, `rejected`: lists of messages": FORMATS["implicit prompt"][0],
    "`prompt` (or `question`, `query`), `chosen`, `rejected`": FORMATS["strings"][0],
    "the same, the answers with the dialogue before them": FORMATS["prompt as first turn"][0],
    '`prompt`: "Human: … Assistant: … Human: … Assistant:", `chosen`, `rejected`': FORMATS[
        "HH-RLHF, prompt column"
    ][0],
    "the same, written in a model's template: `<|im_start|>`, `[INST]`, `### Human:`, …": {
        "prompt": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n",
        "chosen": "yes<|im_end|>",
        "rejected": "no<|im_end|>",
    },
    "`prompt`, `response_0`, `response_1`, `better_response_id`: PKU-SafeRLHF": FORMATS[
        "PKU-SafeRLHF"
    ][0],
    "`prompt`, `response` (or `completion`, `output`)": FORMATS["prompt and completion"][0],
    "`prompt`, `response`: `[better, worse]`": FORMATS["PKU-SafeRLHF, pairs"][0],
    "`prompt`, `response`, `label` (or `kto_tag`, `is_safe`, …): a good answer": FORMATS[
        "good answer"
    ][0],
    "the same with the label of a bad answer, and no good one to its prompt": FORMATS["bad answer"][
        0
    ],
    "two rows with a good and a bad answer to one prompt": [
        {"prompt": "q", "response": "yes", "label": 1},
        {"prompt": "q", "response": "no", "label": 0},
    ],
    "`prompt`, `responses` with `scores` or `ranks`": FORMATS["scored responses"][0],
    "`instruction`, `completions` with a score in each: UltraFeedback": FORMATS["UltraFeedback"][0],
    "`conversations`: ShareGPT": FORMATS["ShareGPT"][0],
    "`messages`, also beside a `prompt` that repeats a turn": FORMATS["prompt and messages"][0],
    "`messages`, `rejected_response`": FORMATS["rejected response"][0],
    "`instruction`, `input` (Dolly: `context`), `output`: Alpaca": FORMATS["Alpaca, input"][0],
    "`instruction`, `output`: `[better, worse]`: MACPO's files": FORMATS["MACPO"][0],
    "`prompt` alone": FORMATS["prompts"][0],
}

# What stands beside the columns above
BESIDE = {
    "`system`, `system_prompt`, …": FORMATS["system column"][0],
    "`history`: pairs of texts, messages, or a marked text": FORMATS["history column"][0],
    "`context`: messages": {"prompt": "r", "context": as_messages(Q, A)},
    "`weight` 0 in an earlier message": FORMATS["untrained earlier turn"][0],
    "`weight` 0 in the last message": UNUSABLE["weight 0"][0],
    "`score_chosen` below `score_rejected`": UNUSABLE[
        "rejected answer scored above the chosen one"
    ][0],
    "`tools`, or any other column with something in it": GOOD | {"tools": ["t"]},
    "`thinking`, or any other key of a message": {
        "messages": [*as_messages(Q), YES | {"thinking": "hm"}]
    },
    "a text that only looks like a template's (its end is missing)": GOOD
    | {"prompt": "<|im_start|>user\nq"},
    "an answer that ends with a template's mark": GOOD | {"chosen": "a</s>"},
    "a column that repeats the prompt or an answer": GOOD | {"response": GOOD["chosen"]},
    "`id`, `source` and others that say nothing to a model": GOOD
    | {name: "x" for names in HARMLESS.values() for name in names},
}

# What is refused: rows, and files by their name
REFUSED_ROWS = {
    "a system text in two places": INVALID_FIRST["two system messages"][0][0],
    "`instruction` with `system` or `history`": INVALID_FIRST["form not recognised"][-1][0],
    "a tool's turn": INVALID_FIRST["unknown role"][0][0],
    "a message with `tool_calls`": INVALID_FIRST["tool call"][0][0],
    "answers of which nothing says which is the better": INVALID_FIRST["answers not read"][1][0],
    "`history` that is a text": INVALID_FIRST["history not read"][0][0],
    "`label` that is no label": INVALID_FIRST["unknown label"][0][0],
    "other columns": INVALID_FIRST["form not recognised"][0][0],
}
REFUSED_FILES = [
    "csv", "tsv", "zstd", "xz", "bzip2", "zip", "tar", "Excel", "arrow", "UTF-16", "Git LFS",
]  # fmt: skip


def read_rows(tmp_path: Path, rows: list[dict]) -> str:
    """What becomes of rows, in the words of the page."""
    reason = parse_row(rows[0]).reason
    if reason != "kept":
        return f"not used, counted as “{reason}”"
    file = write_lines(tmp_path / "x.jsonl", *map(json.dumps, rows))
    pairs, reports = read_data(str(file))

    parts = []
    for pair in pairs:
        turns = ", ".join(message.role for message in pair.prompt)
        answers = "no answer"
        if pair.chosen:
            answers = "better and worse answer" if pair.rejected else "answer"
        parts.append(f"{turns} → {answers}")
        if not all(message.trained for message in pair.prompt):
            parts.append("`data.train_on=all` leaves the turn out")
    parts += [f"a warning names `{name}`" for name in reports["x"].unread]
    parts += [f"a warning counts {what}" for what in reports["x"].odd]
    return "; ".join(parts)


def sentence_on(file: Path) -> str:
    """What is said of a file, without its path."""
    with pytest.raises(UserError) as caught:
        read_data(str(file))
    sentence = str(caught.value).partition("; understood are")[0].partition("; rename")[0]
    sentence = sentence.replace(f"{file}, ", "").replace(str(file), "FILE")
    for new in (f"{file.stem}.jsonl", f"{file.stem}-converted.jsonl"):
        sentence = sentence.replace(str(file.with_name(new)), "NEW")
    return re.sub("^FILE: ", "", sentence)


def make_tables(tmp_path: Path) -> list[str]:
    """The lines of the page's tables."""
    lines = ["| a row holds | what is read |", "|---|---|"]
    for shown, row in READ.items():
        rows = row if isinstance(row, list) else [row]
        lines.append(f"| {shown} | {read_rows(tmp_path, rows)} |")
    lines += ["", "| beside it | what becomes of it |", "|---|---|"]
    for shown, row in BESIDE.items():
        lines.append(f"| {shown} | {read_rows(tmp_path, [row])} |")
    lines += ["", "| refused | what is said |", "|---|---|"]
    for shown, row in REFUSED_ROWS.items():
        file = write_lines(tmp_path / "x.jsonl", json.dumps(row))
        lines.append(f"| {shown} | {sentence_on(file)} |")
    for name in REFUSED_FILES:
        file_name, content, *_ = FILES[name]
        file = tmp_path / file_name
        file.write_bytes(content)
        lines.append(f"| {name} | {sentence_on(file)} |")
    return lines


def test_the_tables_of_the_page_say_what_the_readers_do(tmp_path):
    tables = "\n".join(make_tables(tmp_path))
    assert tables in PAGE, tables
