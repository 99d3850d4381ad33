"""Where the numbers of RESULTS.md lie: assets/results."""

import json
from pathlib import Path

PLACE = Path("assets/results")


def read_result(name: str, place: Path = PLACE) -> dict | None:
    """The content of NAME.json, None if it is not there."""
    file = place / f"{name}.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text("utf-8"))
