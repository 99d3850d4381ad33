"""Texts, rows and files for the tests: odd Unicode, HH-RLHF dialogues, gzipped JSON lines."""

import gzip
import json
import random
from pathlib import Path

from minmacpo.data.records import Message, Pair, example_id

# Texts that tokenizers stumble over.
ODD = [
    "Hello world",
    "été, naïve façade",
    "日本語の文章です。",
    "हिन्दी ਪੰਜਾਬੀ",
    "עברית ‏ العربية",
    "👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "e\u0301 vs \u00e9; ﬁ ½ ①",
    "\ufeffbom",
    "zero\u200bwidth\u200d\u2060",
    "\u00a0nbsp\u3000wide\u2028line\u2029para\x85",
    "\x00",
    "a\x00b",
    "\x01\x02\x1b[31m\x7f",
    "tab\tand\vand\f",
    "\r\n\r\n",
    "\n",
    "\n\n\n",
    " \n \n ",
    "x\n",
    "\nx",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d" + " " * 40 + "e",
    "\t \t",
    " \t\n ",
    "a" * 5000,
    "ab" * 2000,
    "Donaudampfschifffahrtsgesellschaftskapitän" * 20,
    "1234567890" * 100,
    "=" * 300,
    "<user>",
    "<bot>hi</s><s>",
    "</s> </s>",
    "<s>",
    "<unk>",
    "<0x0A><0xFF>",
    "<pad>",
    "[INST] x [/INST]",
    "<|eot_id|>",
    "\n\nHuman: x\n\nAssistant: y",
    "a < b > c",
    "\\n \\t",
    "",
    "'\"`",
    "https://x.y/z?a=b&c=%20",
]

PLANES = [
    (0, 0x7F),
    (0x20, 0x20),
    (0x80, 0x24F),
    (0x370, 0x2FFF),
    (0x3000, 0xD7FF),
    (0xE000, 0xFFFF),
    (0x10000, 0x10FFFF),
]


def random_unicode(rng: random.Random) -> str:
    """Up to 59 characters from everywhere, but no surrogates and no U+2581."""
    letters = []
    for _ in range(rng.randrange(60)):
        first, last = rng.choice(PLANES)
        letters.append(chr(rng.randint(first, last)))
    return "".join(letters).replace("▁", "_")


def random_json_text(rng: random.Random) -> str:
    """Up to 12 characters that JSON or line breaks could spoil."""
    letters = 'ab \n\t\r"\\\u2028\x85\u00e9\u4e2d\U0001f600\x00\x1f'
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, 12)))


def hh_dialogue(*turns: str) -> str:
    """Human, Assistant, Human ... turns, as the files of HH-RLHF have them."""
    parts = []
    for number, turn in enumerate(turns):
        speaker = "Assistant" if number % 2 else "Human"
        parts.append(f"\n\n{speaker}: {turn}")
    return "".join(parts)


def hh_row(prompt: tuple[str, ...] = ("hi",), chosen: str = "good", rejected: str = "bad") -> str:
    """A line of an HH-RLHF file."""
    sides = {"chosen": hh_dialogue(*prompt, chosen), "rejected": hh_dialogue(*prompt, rejected)}
    return json.dumps(sides)


def write_lines(path: Path, *lines: str | bytes) -> Path:
    """A file of these lines, gzipped if its name ends with .gz."""
    content = b""
    for line in lines:
        content += (line if isinstance(line, bytes) else line.encode()) + b"\n"
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_pair(*turns: str, chosen: str = "yes", rejected: str = "no") -> Pair:
    """A pair whose prompt has these turns, the human's first."""
    prompt = []
    for number, turn in enumerate(turns):
        prompt.append(Message("assistant" if number % 2 else "user", turn))
    return Pair(example_id(tuple(prompt)), tuple(prompt), chosen, rejected)
