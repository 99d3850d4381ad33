"""How varied a set of answers is, and what stands out in a single one: no labels and no model."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LOOP_COUNT = 3  # three words in a row that occur so often are a loop
MAX_ORDER = 4  # BLEU-4 looks at runs of one to four words

# A rule of thumb: the phrases of English refusals.
REFUSAL = re.compile(
    r"\b(i must not"
    r"|i (can ?not|can['’]t|won['’]t|will not|am not able to|['’]m not able to|am unable to)"
    r" (help|assist|provide|do|answer|give|support)"
    r"|i (do not|don['’]t) (want|feel comfortable)"
    r"|that (is|would be) illegal)",
    re.IGNORECASE,
)

Ngram = tuple[str, ...]


def ngrams(words: Sequence[str], n: int) -> list[Ngram]:
    """All runs of n words: ["a", "b", "c"] has the two 2-grams ("a", "b") and ("b", "c")."""
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def loops(text: str) -> bool:
    """Whether some three words in a row occur LOOP_COUNT times or more."""
    counts = Counter(ngrams(text.split(), 3))
    return max(counts.values(), default=0) >= LOOP_COUNT


def refuses(text: str) -> bool:
    """Whether an answer declines to help."""
    return REFUSAL.search(text) is not None


def overlap(text: str, other: str) -> float:
    """Jaccard similarity of the words of two texts, in [0, 1]; 1 for two texts without words."""
    words = set(re.findall(r"\w+", text))
    other_words = set(re.findall(r"\w+", other))
    union = words | other_words
    if not union:
        return 1.0
    return len(words & other_words) / len(union)


def distinct2(texts: Sequence[str]) -> float:
    """Distinct word pairs as a fraction of all word pairs (Li et al. 2016); 0 without any."""
    pairs = []
    for text in texts:
        pairs.extend(pairwise(text.split()))
    if not pairs:
        return 0.0
    return len(set(pairs)) / len(pairs)


@dataclass(slots=True)
class HighestCounts:
    """How often an n-gram occurs in the text that has it most often, and in the next one."""

    first: int = 0
    second: int = 0

    def add(self, count: int) -> None:
        """Take the count of one more text into account."""
        if count > self.first:
            self.second = self.first
            self.first = count
        elif count > self.second:
            self.second = count

    def in_others(self, count: int) -> int:
        """The highest count in any text but the one that has the n-gram `count` times."""
        return self.second if count == self.first else self.first


def self_bleu(texts: Sequence[str], max_texts: int = 400) -> float:
    """Mean BLEU-4 of each text against the others (Zhu et al. 2018): in [0, 1], higher is duller.

    Only the first `max_texts` texts are compared. The four orders weigh the same; a text with
    fewer than four words uses the orders that it has.
    """
    split_texts = [text.split() for text in texts[:max_texts] if text.split()]
    if len(split_texts) < 2:
        return 0.0

    highest: dict[Ngram, HighestCounts] = {}
    for words in split_texts:
        for n in range(1, MAX_ORDER + 1):
            for ngram, count in Counter(ngrams(words, n)).items():
                highest.setdefault(ngram, HighestCounts()).add(count)

    lengths = Counter(len(words) for words in split_texts)
    return sum(bleu(words, highest, lengths) for words in split_texts) / len(split_texts)


def bleu(words: list[str], highest: dict[Ngram, HighestCounts], lengths: Counter) -> float:
    """BLEU of one text against the others.

    Args:
        words: the text, in words.
        highest: the highest counts of every n-gram over all texts, this one included.
        lengths: how many texts have each length in words, this one included.
    """
    # Clipped precision of every order; one of 0 counts as half a hit, as its logarithm is infinite
    log_precisions = []
    for n in range(1, min(MAX_ORDER, len(words)) + 1):
        counts = Counter(ngrams(words, n))
        hits = 0
        for ngram, count in counts.items():
            hits += min(count, highest[ngram].in_others(count))
        log_precisions.append(math.log((hits or 0.5) / sum(counts.values())))

    # Brevity penalty against the other text whose length is nearest; of two, the shorter one
    other_lengths = lengths - Counter({len(words): 1})
    nearest = min(other_lengths, key=lambda length: (abs(length - len(words)), length))
    brevity_penalty = min(0.0, 1 - nearest / len(words))
    return math.exp(sum(log_precisions) / len(log_precisions) + brevity_penalty)
