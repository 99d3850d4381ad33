"""How various a set of answers is, and what stands out in single ones: no labels, no model, no torch."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

LOOP = 3  # three words in a row that occur so often are a loop


REFUSAL = re.compile(
    r"\b(i must not|i (can ?not|can['’]t|won['’]t|will not|am not able to|['’]m not able to|am unable to) "
    r"(help|assist|provide|do|answer|give|support)|i (do not|don['’]t) (want|feel comfortable)|that (is|would be) illegal)",
    re.IGNORECASE,
)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def loops(text: str) -> bool:
    """Whether some three words in a row occur LOOP times or more."""
    return max(Counter(ngrams(text.split(), 3)).values(), default=0) >= LOOP


def refuses(text: str) -> bool:
    """Whether an answer declines, by the phrases of English refusals; a rule of thumb."""
    return bool(REFUSAL.search(text))


def overlap(one: str, other: str) -> float:
    """Jaccard similarity of the words of two texts, in [0, 1]; 1 for two without words."""
    a, b = set(re.findall(r"\w+", one)), set(re.findall(r"\w+", other))
    return len(a & b) / len(a | b) if a | b else 1.0


def distinct2(texts: Sequence[str]) -> float:
    """Different word pairs as a share of all (Li et al. 2016); 0 where there are none."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / max(len(pairs), 1)


def self_bleu(texts: Sequence[str], most: int = 400) -> float:
    """Mean BLEU-4 of each of the first `most` texts against the others of them (Zhu et al. 2018), in [0, 1], higher is
    less various. Uniform weights; an n-gram precision of 0 counts as 1 / (2 · n-grams); texts with fewer than four
    words use the orders that they have."""
    words = [text.split() for text in texts[:most] if text.split()]
    if len(words) < 2:
        return 0.0
    top: list[dict] = [
        {} for _ in range(5)
    ]  # per order, n-gram -> its two highest counts in one text
    for said in words:
        for n in range(1, 5):
            for gram, count in Counter(ngrams(said, n)).items():
                top[n][gram] = sorted([*top[n].get(gram, (0, 0)), count])[1:]
    return sum(bleu(said, top, Counter(map(len, words))) for said in words) / len(words)


def bleu(said: list[str], top: list[dict], lengths: Counter) -> float:
    """BLEU of one text against the others, whose n-gram counts `top` and lengths hold beside its own."""
    logs = []
    for n in range(1, min(4, len(said)) + 1):
        grams = Counter(ngrams(said, n))
        total, hits = sum(grams.values()), 0
        for gram, count in grams.items():
            second, first = top[n][gram]
            hits += min(
                count, second if count == first else first
            )  # of the others: its own count does not count
        logs.append(math.log((hits or 0.5) / total))
    others = lengths - Counter({len(said): 1})
    nearest = min(others, key=lambda length: (abs(length - len(said)), length))
    penalty = min(0.0, 1 - nearest / len(said))
    return math.exp(sum(logs) / len(logs) + penalty)
