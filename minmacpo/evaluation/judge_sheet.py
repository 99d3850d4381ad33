"""People as judges: a blind CSV of pairs of answers, and the verdicts of a filled one."""

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.records import Sample
from minmacpo.method.ai_feedback import conversation
from minmacpo.runtime.files import write_atomic

COLUMNS = ("id", "prompt", "first", "second", "verdict")  # verdict: 1, 2 or tie
TEXT_COLUMNS = ("prompt", "first", "second")


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The answers of both sides to one prompt."""

    a: Sample
    b: Sample

    @property
    def id(self) -> str:
        """The prompt's."""
        return self.a.id


def shows_a_first(pair: AnswerPair) -> bool:
    """Whether a reader sees A's answer first: drawn by the prompt, so that the sheet is blind."""
    return random.Random(f"blind/{pair.id}").random() < 0.5


def sheet_texts(pair: AnswerPair) -> list[str]:
    """The prompt and the two answers as a sheet shows them.

    What a spreadsheet could take for a formula starts with an apostrophe.
    """
    first, second = (pair.a, pair.b) if shows_a_first(pair) else (pair.b, pair.a)
    texts = []
    for text in (conversation(pair.a.prompt), first.response, second.response):
        if text and text[0] in "=+-@\t\r":
            text = "'" + text
        texts.append(text)
    return texts


def write_sheet(file: Path, pairs: Sequence[AnswerPair]) -> None:
    """Write a CSV of the pairs, without the names of the sides."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for pair in pairs:
        table.writerow([pair.id, *sheet_texts(pair), ""])
    write_atomic(file, out.getvalue())


def read_sheet(file: Path, pairs: Sequence[AnswerPair]) -> list[dict]:
    """The verdicts of a filled sheet, as those of a model that was asked in the order A, B.

    Raises:
        UserError: the sheet lacks columns, or a row is about another prompt, stands there twice,
            shows other answers, or has another verdict than 1, 2 or tie.
    """
    pair_of = {pair.id: pair for pair in pairs}
    verdicts = {}
    for number, row in enumerate(read_csv(file), 1):
        place = f"{file}, row {number}"
        prompt_id = row["id"]
        if prompt_id in verdicts:
            raise UserError(f"{place}: {prompt_id!r} is there twice")
        if prompt_id not in pair_of:
            raise UserError(
                f"{place}: {prompt_id!r} is about no prompt that both sides have answered"
            )
        verdicts[prompt_id] = {
            "id": prompt_id,
            "order": "ab",
            "verdict": read_verdict(row, pair_of[prompt_id], f"{place}, {prompt_id}"),
        }
    return list(verdicts.values())


def read_csv(file: Path) -> list[dict]:
    """The rows of a sheet that are not empty; UserError if it is none."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows = list(table)
        names = table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no CSV in UTF-8 ({error})") from None
    if not set(COLUMNS) <= set(names):
        raise UserError(
            f"{file}: its first line must name the columns {','.join(COLUMNS)}, "
            "with commas between them"
        )
    # A row that is too long has a list of what is beyond its columns
    return [row for row in rows if any(cell for cell in row.values() if isinstance(cell, str))]


def read_verdict(row: dict, pair: AnswerPair, place: str) -> str | None:
    """ "first" if the row prefers A, "second" if B, "tie", or None without a verdict.

    Args:
        place: where the row stands, for errors.
    """
    # Spreadsheets change line breaks, so that only the words are compared
    shown_words = [(row[column] or "").split() for column in TEXT_COLUMNS]
    if shown_words != [text.split() for text in sheet_texts(pair)]:
        raise UserError(
            f"{place}: its texts are not those of A and B; "
            "the sheet was made for others, or changed"
        )
    verdict = (row["verdict"] or "").strip().lower().removesuffix(".0")
    if verdict == "":
        return None
    if verdict == "tie":
        return "tie"
    if verdict not in ("1", "2"):
        raise UserError(f"{place}: verdict {verdict!r}; expected 1, 2, tie or nothing")
    prefers_shown_first = verdict == "1"
    return "first" if prefers_shown_first == shows_a_first(pair) else "second"
