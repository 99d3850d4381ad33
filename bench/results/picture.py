"""README's picture, assets/world.svg: python -m bench.results.picture [RUN].

The main chart of the run's report (by default that of runs/world) with the report's own style, as
one file.
"""

import re
import sys
from pathlib import Path

from minmacpo.evaluation.charts import WIDE, chart
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.html import read_style
from minmacpo.evaluation.report import over_rounds
from minmacpo.evaluation.table import make_table
from minmacpo.runtime.files import write_atomic
from minmacpo.runtime.progress import run_main


def picture(run: str) -> str:
    """The chart of gold reward over the rounds as an SVG that stands alone."""
    style = read_style()
    style += "svg{background:var(--paper);font:13px system-ui,sans-serif;margin:0}"
    rows = make_table(read_run(run))["rows"]
    drawing = chart(over_rounds(rows, "gold"), "round", WIDE)
    opening = '<svg xmlns="http://www.w3.org/2000/svg" width="1070" height="440"'
    return re.sub("^<svg", opening, drawing).replace(">", f"><style>{style}</style>", 1)


def main(words: list[str]) -> int:
    """Write the picture; returns the exit code."""
    run = words[0] if words else "runs/world"
    write_atomic(Path("assets/world.svg"), picture(run))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
