"""Patterns that come with a file: `re` tries every way in which one may match, so those with too many ways are refused."""

import re

PART = re.compile(r"\[\^?\]?(?:\\.|[^]\\])*\]|\\p\{\w+\}|\\.", re.DOTALL)  # brackets, a category, an escape
HIDING = re.compile(r"\(\?(#|[a-zA-Z]*x)")  # a comment, or the flag that allows some: marks in them are none
MOST_WAYS = 4096  # that matching may go at one place beside repeats; the tokenizers of 2025 have 28, the layers of a model 448


def check_ways(pattern: str, repeats: int, long: bool = False) -> None:
    """re.error where matching `pattern`, which compiles, may take for ever: a repeated group, more repeats (* + {}) than these in
    one of its alternatives (time goes with the length of the text to that power), or too many choices (? and |). In `long` texts
    nothing may have to follow two repeats, either, as time would go with the length to the power of three."""
    if HIDING.search(pattern):
        raise re.error("a comment, or the flag x")
    ways, repeated, choices, plain = 1, 0, [], PART.sub("x", pattern)
    for found in re.finditer(r"\)[*+{]|\(\??|[)|]|[*+{?][+?]?", plain + "|"):
        match found[0][0]:
            case "(":
                choices.append(1)
            case "|" if choices:
                choices[-1] += 1
            case "|":
                if long and repeated > 1 and plain[found.start() - 1] not in "*+?}":
                    raise re.error("two repeats, and something that must follow")
                ways, repeated = 1, 0
            case ")":
                ways *= choices.pop()
                repeated += (repeats + 1) * (len(found[0]) > 1)
            case "?":
                ways *= 2
            case _:
                repeated += 1
        if repeated > repeats or ways > MOST_WAYS:
            raise re.error(f"a repeated group, more than {repeats} repeats, or too many choices")
