"""Mutators: the content of a good file in, that of a bad one out.

All draw whole numbers and choices from the Random that they are given. It may be Hypothesis's,
which makes draws smaller where a test fails, so the plain thing comes first.
"""

import copy
import functools
import gzip
import json
import re
import struct
from collections.abc import Callable
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
    """One to four changes of bytes: a bit turned over, bytes set, cut out, put in, moved ..."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 30, 400))
        part = bytes(out[at : at + size])
        match rng.randrange(9):
            case 0:
                bit = 1 << rng.randrange(8)
                out[at : at + 1] = bytes(byte ^ bit for byte in part[:1])
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
                out[at : at + 8] = struct.pack("<Q", random_length(rng, len(out)))
            case 8:
                out[at : at + size] = rng.randbytes(len(part))
    return bytes(out)


def random_length(rng: Random, true_length: int) -> int:
    """A number of 64 bits that a file may give as a length or an offset."""
    anything = rng.randrange(2**40)
    return rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1, true_length, anything))


# ---- JSON -----------------------------------------------------------------------------------


def paths_in(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value, its own first."""
    paths = [path]
    if isinstance(value, dict):
        for name, inner in value.items():
            paths += paths_in(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            paths += paths_in(inner, (*path, index))
    return paths


def value_at(value: object, path: tuple) -> object:
    """The value at a path."""
    for step in path:
        value = value[step]
    return value


def similar_value(value: object, rng: Random) -> object | None:
    """A JSON value that is much like another one; None where nothing is."""
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        inserted = rng.choice((rng.choice(TEXTS), value))
        return value[:at] + inserted + value[at + rng.randrange(3) :]
    if type(value) in (int, float):
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
    if isinstance(value, list) and value:
        return rng.choice(
            (value[::-1], value[:-1], value + value[:1], value * 3, value[0], [value])
        )
    return None


def changed(value: object, rng: Random) -> object:
    """A JSON value in the place of another: one much like it, one that holds it, or any."""
    kind = rng.randrange(3)
    if kind == 0:
        similar = similar_value(value, rng)
        if similar is not None:
            return similar
    if kind == 1 and rng.randrange(10) > 6:
        return rng.choice(({"a": value}, [value], [value, value]))
    return copy.deepcopy(rng.choice(VALUES))


def reshape(value: object, rng: Random) -> object:
    """A JSON value with one of its parts changed, taken out, renamed, or put elsewhere."""
    paths = paths_in(value)
    if rng.randrange(5) < 3:
        path = rng.choice(paths)
    else:
        path = rng.choice([path for path in paths if len(path) <= 2])
    if not path:
        return changed(value, rng)

    parent = value_at(value, path[:-1])
    name = path[-1]
    match rng.randrange(6):
        case 3:
            del parent[name]
        case 4 if isinstance(parent, dict):
            new_name = rng.choice((*parent, *TEXTS, f"{name}s"))
            parent[new_name] = parent.pop(name)
        case 5:
            other = value_at(value, rng.choice(paths))
            parent[name] = json.loads(json.dumps(other))
        case _:
            parent[name] = changed(parent[name], rng)
    return value


@functools.lru_cache
def style_of(data: bytes) -> dict:
    """How json.dumps writes what is written like this: a change is then all that differs."""
    value = json.loads(data)
    for style in STYLES:
        if json.dumps(value, ensure_ascii=False, **style).encode() == data.strip():
            return style
    return {}


def structured(data: bytes, rng: Random) -> bytes:
    """JSON with one to three of its parts changed.

    Now and then it is written in another way, or has a name twice.
    """
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = reshape(value, rng)
    keeps_letters = rng.randrange(10) >= 7
    style = rng.choice((style_of(data), *STYLES))
    text = json.dumps(value, ensure_ascii=not keeps_letters, **style)
    if rng.randrange(20) == 19:
        first_member = text[1:60].partition(",")[0]
        text = text.replace(", ", f", {first_member}, ", 1)
    white_space = data[len(data.rstrip()) :]
    return text.encode("utf-8", "surrogatepass") + white_space


# ---- text -----------------------------------------------------------------------------------


def lined(data: bytes, rng: Random) -> bytes:
    """Text with a line changed; or lines taken out, doubled, moved or run together."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(9):
        case 5:
            del lines[at]
        case 6:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 7:
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
        case 8:
            lines.insert(at, rng.choice(CHUNKS))
        case _:
            change = structured if lines[at].startswith(b"{") else worded
            lines[at] = change(lines[at], rng)
    return b"\n".join(lines)


def worded(data: bytes, rng: Random) -> bytes:
    """Text with one of its words, numbers or quoted texts changed."""
    words = re.findall(rb'"[^"\n]*"|[\w.+-]+|\s+|.', data) or [b""]
    at = rng.randrange(len(words))
    value = copy.deepcopy(rng.choice(VALUES))
    as_json = json.dumps(value, ensure_ascii=rng.choice((True, False)))
    word = rng.choice((as_json, str(value), "", "2020-01-01", "1e999", "0x10"))
    words[at] = word.encode("utf-8", "surrogatepass")
    if rng.randrange(5) == 4:
        words.insert(at, rng.choice(words))
    return b"".join(words)


def zipped(data: bytes, rng: Random) -> bytes:
    """A .gz file whose text is changed, or whose bytes are."""
    if rng.randrange(10) > 6:
        return raw(data, rng)
    change = rng.choice((lined, raw))
    return gzip.compress(change(gzip.decompress(data), rng), compresslevel=1, mtime=0)


# ---- tensors --------------------------------------------------------------------------------


def tensors(data: bytes, rng: Random) -> bytes:
    """A .safetensors file with its header changed as JSON; mostly its length is told rightly."""
    size = int.from_bytes(data[:8], "little")
    header = structured(data[8 : 8 + size].rstrip(), rng)
    if rng.randrange(5) < 4:
        header += b" " * (-len(header) % 8)
    told_size = len(header)
    if rng.randrange(10) == 9:
        told_size = rng.choice((0, 1, told_size + 8, 2**40, 2**63, 2**64 - 1))
    return told_size.to_bytes(8, "little") + header + data[8 + size :]


# ---- protocol buffers -----------------------------------------------------------------------

# Kinds of fields, the last three bits of a tag
VARINT = 0
FIXED_64 = 1
BYTES = 2
FIXED_32 = 5


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(a number of a protocol buffer, where it ends)."""
    value = 0
    shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def write_varint(value: int) -> bytes:
    """A number as a protocol buffer has it, of 64 bits."""
    value %= 2**64
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def read_fields(data: bytes) -> list[list]:
    """[tag, number or bytes] of every field; IndexError or KeyError where there is no message."""
    fields = []
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = read_varint(data, at)
        else:
            if kind == BYTES:
                size, at = read_varint(data, at)
            else:
                size = {FIXED_64: 8, FIXED_32: 4}[kind]
            if at + size > len(data):
                raise IndexError
            value = data[at : at + size]
            at += size
        fields.append([tag, value])
    return fields


def write_fields(fields: list[list]) -> bytes:
    """The message of such fields."""
    out = b""
    for tag, value in fields:
        out += write_varint(tag)
        kind = tag & 7
        if kind == VARINT:
            out += write_varint(value)
            continue
        if kind == BYTES:
            out += write_varint(len(value))
        out += value
    return out


def is_message(value: object) -> bool:
    """Whether a field's value is a message itself."""
    try:
        return isinstance(value, bytes) and bool(read_fields(value))
    except (IndexError, KeyError):
        return False


def buffers(data: bytes, rng: Random) -> bytes:
    """A protocol buffer (tokenizer.model) with one field changed.

    The field, or one of a message in it, is changed, doubled, taken out or renamed.
    """
    fields = read_fields(data)
    # often not one of the thousand pieces, which come first
    rare = [index for index, (tag, _) in enumerate(fields) if tag != fields[0][0]]
    at = rng.randrange(len(fields))
    if rare and rng.randrange(5) > 2:
        at = rng.choice(rare)
    tag, value = fields[at]

    if is_message(value) and rng.randrange(5) < 4:
        fields[at][1] = buffers(value, rng)
        return write_fields(fields)
    match rng.randrange(6):
        case 0:
            del fields[at]
        case 1:
            fields.insert(rng.randrange(len(fields) + 1), fields[at])
        case 2:
            fields[at] = renamed_field(tag, value, rng)
        case _:
            fields[at][1] = changed_field(tag, value, rng)
    return write_fields(fields)


def renamed_field(tag: int, value: object, rng: Random) -> list:
    """The field under the tag of another one, or of another kind, with a value of that kind."""
    new_tag = rng.choice(
        (
            tag + 8,
            tag - 8 if tag > 15 else tag,
            rng.randrange(1, 45) << 3 | rng.choice((VARINT, BYTES, FIXED_32)),
            tag & ~7 | rng.choice((VARINT, FIXED_64, BYTES, FIXED_32)),
        )
    )
    if new_tag & 7 != tag & 7:
        value = {VARINT: 1, FIXED_64: b"8" * 8, BYTES: b"x", FIXED_32: b"4444"}[new_tag & 7]
    return [new_tag, value]


def changed_field(tag: int, value: object, rng: Random) -> object:
    """Another value of the same kind."""
    if isinstance(value, int):
        near = (value + 1, value * 1000)
        far = (2**31, 2**32, -1, 2**63, rng.randrange(64))
        return rng.choice((0, 1, 2, 3, 4, 5, 6, *near, *far))
    text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    new_value = rng.choice((raw(value, rng), text, rng.choice(CHUNKS)))
    if tag & 7 == BYTES:
        return new_value
    return (new_value + bytes(8))[: len(value)]
