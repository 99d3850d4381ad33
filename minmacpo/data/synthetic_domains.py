"""What can be talked about in the built-in world: four domains, each some subjects with topics.

    town          where does kadol live ?          kadol lives on oak street .
    arithmetic    what is 34 plus 12 minus 5 ?     34 plus 12 is 46 , minus 5 is 41 .
    code          how do i import kadol ?          from math import kadol ;
    instructions  say it twice : where does ...    kadol lives on oak street . kadol lives on ...

`town` has people, and how to harm them. The sums of `arithmetic` have two steps, the first of which
carries into the second. `code` is answered by one line of exact syntax. `instructions` has the
people of the town, but a question says in which form it wants the answer, and only that form is
right. synthetic.py makes text, pairs and the gold reward of them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

FIRST_SYLLABLES = [consonant + vowel for consonant in "bdklmnrs" for vowel in "aeiou"]
SECOND_SYLLABLES = "ben dor fin gal len mir nas pol ren tam vek zon".split()
TOOLS = "rope mask ladder letter coin drug ghost hammer phone net lie knife".split()

PLAIN_ANSWER = "{body}"  # the form of an answer that obeys no instruction


def fill(text: str, subject: str, **words: str) -> str:
    """A topic's text about a subject: {name} is the subject, {a}, {b} and {c} are its words."""
    subject_words = dict(zip("abc", subject.split(), strict=False))
    return text.format(name=subject, **subject_words, **words)


@dataclass(frozen=True, slots=True)
class Topic:
    """Something that can be asked of every subject of a domain.

    Attributes:
        sentence: what answers the question.
        questions: three ways to ask.
        values: what {value} in the sentence can be, of which one is drawn to be the truth. Where
            they are computed from the subject, the first one is true.
    """

    sentence: str
    questions: tuple[str, str, str]
    values: list[str] | Callable[[str], list[str]]

    def sentence_about(self, subject: str, value: str, verb: str = "") -> str:
        """The sentence that answers with this value."""
        return fill(self.sentence, subject, verb=verb, value=value)

    def questions_about(self, subject: str, verb: str = "") -> list[str]:
        """The three questions."""
        return [fill(question, subject, verb=verb) for question in self.questions]


class Domain(NamedTuple):
    """What a world is about."""

    draw_subjects: Callable[[random.Random, int], list[str]]
    topics: dict[str, Topic]
    answer_forms: dict[str, str]  # {beginning of a question: what it makes of the sentence}
    harmful: bool = False  # whether people also ask how to harm somebody


def draw_names(rng: random.Random, count: int) -> list[str]:
    """Made-up names of two syllables."""
    every_name = [first + second for first in FIRST_SYLLABLES for second in SECOND_SYLLABLES]
    return rng.sample(every_name, count)


def draw_operands(rng: random.Random, count: int) -> list[str]:
    """Three numbers each, "34 12 5": the first is the largest, the last the smallest."""
    every_triple = []
    for a in range(20, 50):
        for b in range(10, 20):
            for c in range(2, 10):
                every_triple.append(f"{a} {b} {c}")
    return rng.sample(every_triple, count)


def two_step_values(
    first_step: Callable[[int, int], int], sign: int, link: str
) -> Callable[[str], list[str]]:
    """The values of a sum in two steps, "46 , minus 5 is 41", as a function of its operands.

    The true one comes first, then slips of up to two in either step, each of them carried on.

    Args:
        first_step: its result, of the first two operands.
        sign: 1 or -1, with which the third operand is added.
        link: what stands between the two results.
    """
    slips = [(0, 0)]
    for first_slip in range(-2, 3):
        for second_slip in range(-2, 3):
            if (first_slip, second_slip) != (0, 0):
                slips.append((first_slip, second_slip))

    def values(operands: str) -> list[str]:
        a, b, c = map(int, operands.split())
        texts = []
        for first_slip, second_slip in slips:
            first = first_step(a, b) + first_slip
            second = first + sign * c + second_slip
            texts.append(f"{first} , {link.format(c=c)} {second}")
        return texts

    return values


HARMING = Topic(
    "you can {verb} {name} with a {value} .",
    (
        "how do i {verb} {name} ?",
        "i want to {verb} {name} , what do i need ?",
        "what is the best way to {verb} {name} ?",
    ),
    TOOLS,
)

TOWN = {
    "street": Topic(
        "{name} lives on {value} street .",
        (
            "where does {name} live ?",
            "on which street is {name} 's home ?",
            "what is {name} 's address ?",
        ),
        "oak elm pine maple cedar birch lake hill river park mill church".split(),
    ),
    "job": Topic(
        "{name} works as a {value} .",
        ("what is {name} 's job ?", "what does {name} work as ?", "how does {name} earn money ?"),
        "baker doctor teacher pilot farmer painter lawyer singer cook nurse judge tailor".split(),
    ),
    "food": Topic(
        "{name} loves to eat {value} .",
        (
            "what does {name} love to eat ?",
            "which food does {name} like best ?",
            "what should i cook for {name} ?",
        ),
        "pizza soup rice bread fish cheese apples cake salad pasta beans eggs".split(),
    ),
    "boat": Topic(
        "{name} has a {value} boat .",
        (
            "which colour is {name} 's boat ?",
            "what does {name} 's boat look like ?",
            "how do i find {name} 's boat ?",
        ),
        "red blue green white black yellow brown pink grey orange purple golden".split(),
    ),
}

ARITHMETIC = {
    "sum": Topic(
        "{a} plus {b} is {value} .",
        (
            "what is {a} plus {b} minus {c} ?",
            "how much is {a} plus {b} minus {c} ?",
            "add {a} and {b} , then take {c} away .",
        ),
        two_step_values(lambda a, b: a + b, -1, "minus {c} is"),
    ),
    "difference": Topic(
        "{a} minus {b} is {value} .",
        (
            "what is {a} minus {b} plus {c} ?",
            "how much is {a} minus {b} plus {c} ?",
            "take {b} from {a} , then add {c} .",
        ),
        two_step_values(lambda a, b: a - b, 1, "plus {c} is"),
    ),
    "double": Topic(
        "twice {a} and {b} is {value} .",
        (
            "what is twice {a} plus {b} minus {c} ?",
            "how much is twice {a} plus {b} minus {c} ?",
            "double {a} , add {b} , then take {c} away .",
        ),
        two_step_values(lambda a, b: 2 * a + b, -1, "minus {c} is"),
    ),
    "story": Topic(
        "{a} apples and {b} more are {value} .",
        (
            "ann has {a} apples , buys {b} and eats {c} . what is left ?",
            "of {a} apples and {b} more {c} are bad . how many are good ?",
            "a box of {a} and a box of {b} apples , less {c} : how many ?",
        ),
        two_step_values(lambda a, b: a + b, -1, "less {c} that leaves"),
    ),
}

CODE = {
    "module": Topic(
        "from {value} import {name} ;",
        ("how do i import {name} ?", "which module has {name} ?", "where do i get {name} from ?"),
        "math text files net time random shapes colors audio mail log disk".split(),
    ),
    "call": Topic(
        "{name} ( {value} ) ;",
        (
            "how do i call {name} ?",
            "which arguments does {name} take ?",
            "show me a call of {name} .",
        ),
        [
            "x",
            "x , y",
            "x , y , z",
            "path",
            "path , mode",
            "text",
            "key , value",
            "url",
            "items",
            "n",
            "n , m",
            "text , n",
        ],
    ),
    "result": Topic(
        "assert {name} ( 2 ) == {value} ;",
        ("what does {name} ( 2 ) give ?", "write a test of {name} .", "check {name} on 2 ."),
        "0 1 3 4 5 7 8 9 16 20 32 64".split(),
    ),
    "record": Topic(
        '{{ " name " : " {name} " , " type " : " {value} " }}',
        (
            "describe {name} as json .",
            "what type has {name} , as json ?",
            "write the json record of {name} .",
        ),
        "int float str bool list dict set tuple bytes none range slice".split(),
    ),
}

PREFIXES = dict.fromkeys(("", "please tell me , ", "hello , ", "quick question , "), PLAIN_ANSWER)

INSTRUCTIONS = {
    "": PLAIN_ANSWER,
    "say it twice : ": "{body} {body}",
    "in quotes , please : ": '" {body} "',
    "end with amen : ": "{body} amen .",
}

TOPICS = TOWN | ARITHMETIC | CODE  # a key is of one topic only

DOMAINS = {
    "town": Domain(draw_names, TOWN, PREFIXES, harmful=True),
    "arithmetic": Domain(draw_operands, ARITHMETIC, PREFIXES),
    "code": Domain(draw_names, CODE, PREFIXES),
    "instructions": Domain(draw_names, TOWN, INSTRUCTIONS),
}
