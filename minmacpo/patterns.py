"""Patterns that come with a file: `re` tries every way in which one may match, so those with too many ways are refused."""

import re

PART = re.compile(r"\[(?:\\.|[^]\\])*\]|\\p\{\w+\}|\\.", re.DOTALL)  # brackets, a category, an escape
MOST_WAYS = 4096  # that matching may go at one place beside repeats; the tokenizers of 2025 have 28, the layers of a model 448


def check_ways(pattern: str, repeats: int) -> None:
    """re.error where matching `pattern`, which compiles, may take for ever: a repeated group, more repeats (* + {}) than these in one of its
    alternatives (time goes with the length of the text to that power), or too many choices (? and |)."""
    ways, repeated, choices = 1, 0, []
    for mark in re.findall(r"\)[*+{]|\(\??|[)|]|[*+{?][+?]?", PART.sub("x", pattern)):
        if mark[0] == "(":
            choices.append(1)
        elif mark == "|" and choices:
            choices[-1] += 1
        elif mark == "|":
            ways, repeated = 1, 0
        elif mark == ")":
            ways *= choices.pop() if choices else 1  # a comment may hold one more
        elif mark[0] == "?":
            ways *= 2
        else:  # a repeat, or a group that is repeated
            repeated += 1 if mark[0] != ")" else repeats + 1
        if repeated > repeats or ways > MOST_WAYS:
            raise re.error(f"a repeated group, more than {repeats} repeats, or too many choices")
