"""`python -m bench.results`: see page.py."""

import sys

from bench.results.page import main
from minmacpo.runtime.progress import run_main

if __name__ == "__main__":
    sys.exit(run_main(main, "what is not announced above is not done."))
