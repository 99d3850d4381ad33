"""Mutators: the content of a good file in, that of a bad one out.

All draw whole numbers and choices from the Random they are given, which may be Hypothesis's: it makes them smaller, so the plain thing comes first.
"""

import copy
import gzip
import json
import re
import struct
from collections.abc import Callable
from functools import lru_cache
from random import Random

TEXTS = [
    "",
    " ",
    "\x00",
    "\n",
    "\ud800",
    "\u202e",
    "\ufeff",
    "é" * 300,
    "a" * 5000,
    "../x",
    "/",
    "{}",
    "{0}",
    "[[A]]",
    "none",
    "nan",
    "1",
    "-1",
    "1" * 400,
    "<s>",
    "<|eot_id|>",
    "model.safetensors",
    "x",
    "[",
    "\\",
    "(?i)x",
    "\\p{L}+",
    "%s",
    "'",
    '"',
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    255,
    65536,
    2**31,
    2**53,
    2**63,
    -(2**63),
    10**18,
    10**30,
    0.0,
    0.5,
    -0.5,
    1e-320,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    [],
    {},
    [[]],
    [None],
    [1],
    ["a"],
    {"a": 1},
    [{}],
    *TEXTS,
]
CHUNKS = [
    b"",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\n",
    b"\r\n",
    b"[",
    b"{",
    b"]",
    b"}",
    b'"',
    b"\\",
    b",",
    b":",
    b"null",
    b"NaN",
    b"-",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\x1f\x8b",
    b"\\ud800",
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x80" * 20,
]
STYLES: tuple[dict, ...] = ({"indent": 1}, {}, {"separators": (",", ":")})
Mutator = Callable[[bytes, Random], bytes]


def raw(data: bytes, rng: Random) -> bytes:
    """One to four changes of bytes: turned over, set, cut out, put in, doubled, moved, cut off, a long repeat."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 30, 400))
        part = bytes(out[at : at + size])
        match rng.randrange(9):
            case 0:
                out[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1])
            case 1:
                out[at : at + 1] = rng.randbytes(1)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = rng.choice(CHUNKS)
            case 4:
                out[at:at] = part * rng.choice((1, 2, 9, 2000))
            case 5:
                del out[at : at + size]
                to = rng.randrange(len(out) + 1)
                out[to:to] = part
            case 6:
                del out[at:]
            case 7:
                out[at : at + 8] = struct.pack(
                    "<Q",
                    rng.choice(
                        (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(out), rng.randrange(2**40))
                    ),
                )
            case 8:
                out[at : at + size] = rng.randbytes(len(part))
    return bytes(out)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] + [found for key, each in inner for found in places(each, (*path, key))]


def changed(value: object, rng: Random) -> object:
    """A JSON value in the place of another: any one, or one much like it."""
    kind = rng.randrange(3)
    if kind == 0 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice((rng.choice(TEXTS), value)) + value[at + rng.randrange(3) :]
    if kind == 0 and type(value) in (int, float):
        return rng.choice(
            (
                -value,
                value + 1,
                value - 1,
                value * 2,
                value * 1000,
                value / 2,
                float(value),
                str(value),
                value * 2**40,
            )
        )
    if kind == 0 and isinstance(value, list) and value:
        return rng.choice(
            (value[::-1], value[:-1], value + value[:1], value * 3, value[0], [value])
        )
    return (
        rng.choice(({"a": value}, [value], [value, value]))
        if kind == 1 and rng.randrange(10) > 6
        else copy.deepcopy(rng.choice(VALUES))
    )


def reshape(value: object, rng: Random) -> object:
    """A JSON value with one of its parts changed, taken out, renamed, or put where another one was."""
    paths = places(value)
    path = rng.choice(paths if rng.randrange(5) < 3 else [p for p in paths if len(p) <= 2])
    if not path:
        return changed(value, rng)
    home = value
    for key in path[:-1]:
        home = home[key]
    act, key = rng.randrange(6), path[-1]
    if act == 3:
        del home[key]
    elif act == 4 and isinstance(home, dict):
        home[rng.choice((*home, *TEXTS, str(key) + "s"))] = home.pop(key)
    elif act == 5:
        other = value
        for step in rng.choice(paths):
            other = other[step]
        home[key] = json.loads(json.dumps(other))
    else:
        home[key] = changed(home[key], rng)
    return value


@lru_cache
def style(data: bytes) -> dict:
    """How json.dumps writes what is written like this: a change is then all that differs."""
    value = json.loads(data)
    return next(
        (
            words
            for words in STYLES
            if json.dumps(value, ensure_ascii=False, **words).encode() == data.strip()
        ),
        {},
    )


def structured(data: bytes, rng: Random) -> bytes:
    """JSON with one to three of its parts changed; now and then written in another way, or with a key twice."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = reshape(value, rng)
    text = json.dumps(
        value, ensure_ascii=rng.randrange(10) < 7, **rng.choice((style(data), *STYLES))
    )
    if rng.randrange(20) == 19:
        text = text.replace(", ", f", {text[1:60].partition(',')[0]}, ", 1)
    return text.encode("utf-8", "surrogatepass") + data[len(data.rstrip()) :]


def lined(data: bytes, rng: Random) -> bytes:
    """Text with a line changed as JSON, if it is such; or lines taken out, doubled, moved, swapped or run together."""
    lines = data.split(b"\n")
    at, act = rng.randrange(len(lines)), rng.randrange(9)
    if act < 5 and lines[at][:1] == b"{":
        lines[at] = structured(lines[at], rng)
    elif act < 5:
        lines[at] = worded(lines[at], rng)
    elif act == 5:
        del lines[at]
    elif act == 6:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif act == 7:
        lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    else:
        lines.insert(at, rng.choice(CHUNKS))
    return b"\n".join(lines)


def worded(data: bytes, rng: Random) -> bytes:
    """Text with one of its words, numbers or quoted texts changed."""
    words = re.findall(rb'"[^"\n]*"|[\w.+-]+|\s+|.', data) or [b""]
    at, value = rng.randrange(len(words)), copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value, ensure_ascii=rng.choice((True, False)))
    words[at] = rng.choice((text, str(value), "", "2020-01-01", "1e999", "0x10")).encode(
        "utf-8", "surrogatepass"
    )
    if rng.randrange(5) == 4:
        words.insert(at, rng.choice(words))
    return b"".join(words)


def tensors(data: bytes, rng: Random) -> bytes:
    """A .safetensors file with its header changed as JSON; its length is told rightly, most of the time."""
    size = int.from_bytes(data[:8], "little")
    header = structured(data[8 : 8 + size].rstrip(), rng)
    header += b" " * (-len(header) % 8 if rng.randrange(5) < 4 else 0)
    told = (
        len(header)
        if rng.randrange(10) < 9
        else rng.choice((0, 1, len(header) + 8, 2**40, 2**63, 2**64 - 1))
    )
    return told.to_bytes(8, "little") + header + data[8 + size :]


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number of a protocol buffer at `at`, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def number(value: int) -> bytes:
    """A number as a protocol buffer has it, of 64 bits."""
    value, out = value % 2**64, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


def fields(data: bytes) -> list[list]:
    """[tag, value] of a message of a protocol buffer: numbers, and bytes; IndexError where it is none."""
    found, at = [], 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            if at + size > len(data):
                raise IndexError
            value, at = data[at : at + size], at + size
        found.append([tag, value])
    return found


def message(found: list[list]) -> bytes:
    """The bytes of such fields."""
    said = lambda tag, value: (
        number(value) if tag & 7 == 0 else (number(len(value)) if tag & 7 == 2 else b"") + value
    )  # noqa: E731
    return b"".join(number(tag) + said(tag, value) for tag, value in found)


def buffers(data: bytes, rng: Random) -> bytes:
    """A protocol buffer (tokenizer.model) with a field, or one of a message in it, changed, doubled, taken out or renamed."""
    found = fields(data)
    rare = [
        i for i, (tag, _) in enumerate(found) if tag != found[0][0]
    ]  # not one of the thousand pieces
    at = rng.choice(rare) if rare and rng.randrange(5) > 2 else rng.randrange(len(found))
    tag, value = found[at]
    try:
        inner = isinstance(value, bytes) and fields(value) and rng.randrange(5) < 4
    except (IndexError, KeyError):
        inner = False
    if inner:
        found[at][1] = buffers(value, rng)
    elif (act := rng.randrange(6)) == 0:
        del found[at]
    elif act == 1:
        found.insert(rng.randrange(len(found) + 1), found[at])
    elif act == 2:
        found[at][0] = retagged(tag, rng)
        found[at][1] = (
            value
            if found[at][0] & 7 == tag & 7
            else {0: 1, 1: b"8" * 8, 2: b"x", 5: b"4444"}[found[at][0] & 7]
        )
    elif isinstance(value, int):
        found[at][1] = rng.choice(
            (
                0,
                1,
                2,
                3,
                4,
                5,
                6,
                value + 1,
                value * 1000,
                2**31,
                2**32,
                -1,
                2**63,
                rng.randrange(64),
            )
        )
    else:
        text = rng.choice(
            (
                raw(value, rng),
                rng.choice(TEXTS).encode("utf-8", "surrogatepass"),
                rng.choice(CHUNKS),
            )
        )
        found[at][1] = text if tag & 7 == 2 else (text + bytes(8))[: len(value)]
    return message(found)


def retagged(tag: int, rng: Random) -> int:
    """The tag of another field, or of another kind."""
    return rng.choice(
        (
            tag + 8,
            tag - 8 if tag > 15 else tag,
            rng.randrange(1, 45) << 3 | rng.choice((0, 2, 5)),
            tag & ~7 | rng.choice((0, 1, 2, 5)),
        )
    )


def zipped(data: bytes, rng: Random) -> bytes:
    """A .gz file whose text is changed, or whose bytes are."""
    if rng.randrange(10) > 6:
        return raw(data, rng)
    return gzip.compress(rng.choice((lined, raw))(gzip.decompress(data), rng), 1, mtime=0)
