"""minmacpo: weak-to-strong alignment with MACPO (arXiv 2410.07672) in minimal PyTorch.

Only the one exception that every module may raise lives here; the map for reading is in README.md.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = (
        "minmacpo needs Python 3.11 or newer (it reads TOML with the standard library); this is "
    )
    remedy = ". Make the environment with a newer one: python3.11 -m venv .venv"
    print(found + sys.version.split()[0] + remedy, file=sys.stderr)
    raise SystemExit(2)

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user can mend; the programs print it as one sentence and exit with code 2."""

    def __str__(self) -> str:
        """The sentence, of which the middle is left out where what it names is endless."""
        text = super().__str__()
        return text if len(text) <= 1000 else f"{text[:700]} … {text[-290:]}"
