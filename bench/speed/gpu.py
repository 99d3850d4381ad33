"""Everything on one card: python -m bench.speed.gpu [--large] [--tiny].

Without a word: DPO-LoRA, sampling and scoring at Llama-2-7B's shape (card_7b.py); with --large, at
Llama-2-70B's in int8 and nf4 (card_70b.py). A call takes under nine minutes, and the file holds
what there is after each measurement. Needs only the repository: weights are made at random on the
device; a library that is not installed is named in the row. --tiny runs the same code at toy size,
on a CPU if need be.
"""

from bench.speed import card_7b, card_70b
from bench.speed.timing import read_words

if __name__ == "__main__":
    words = read_words(["--tiny", "--large"])
    measure = card_70b.main if "--large" in words else card_7b.main
    measure("--tiny" in words)
