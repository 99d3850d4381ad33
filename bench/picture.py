"""The README's picture, assets/world.svg: python -m bench.picture [RUN], by default runs/world.

The main chart of the run's report with the report's own style, as one file.
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


def picture(run: str) -> str:
    """The chart of gold reward over the rounds as an SVG that stands alone."""
    style = read_style()
    style += "svg{background:var(--paper);font:13px system-ui,sans-serif;margin:0}"
    rows = make_table(read_run(run))["rows"]
    drawing = chart(over_rounds(rows, "gold"), "round", WIDE)
    opened = '<svg xmlns="http://www.w3.org/2000/svg" width="1070" height="440"'
    return re.sub("^<svg", opened, drawing).replace(">", f"><style>{style}</style>", 1)


if __name__ == "__main__":
    sys.exit(
        run_main(
            lambda words: (
                write_atomic(Path("assets/world.svg"), picture(words[0] if words else "runs/world"))
                or 0
            )
        )
    )
