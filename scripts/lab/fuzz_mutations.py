"""Changes of valid inputs for ``fuzz``: of bytes, of JSON, of pickles, of texts. Every change is drawn from a seed."""

import json
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from random import Random
from typing import Any, TypeAlias

# A random source, an input, and another one of the same reader to take parts from.
Mutate: TypeAlias = Callable[[Random, bytes, bytes], bytes]

_MOST_BYTES = 1 << 20
_NUMBERS = (0, 1, 2, 7, 63, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
# Values of JSON as they are written, most of which no writer of ours writes.
_TOKENS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1", "-0", "0", "1", "2", "0.5", "1e-320", "null", "true", "false"),
    *("2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e308"),
    *("1" + "0" * 30, "9" * 5000, "[]", "{}", '""', '".."', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"'),
    *('"\\u202ex"', '"C:\\\\x"', '"a/b"', '"\\u001b[2J"', '"a\\nb"', '"' + "x" * 5000 + '"', "[" * 2000, "[" * 100_000),
    *('"fifo"', '"loop"', '"outside"', '"device"', '"folder"', '"./outside"', '"folder/../../outside.txt"', "[[]]"),
    *('"manifest.json"', '{"a":1,"a":2}', "[1e999]", '"0"', '"-1"', '"NaN"', '"\\u0130"', '"ﬁ"', '{"":{}}'),
)


class _Raw(str):
    """Text that stands in JSON as it is."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys in order, each as often as it is there."""


def bytes_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """Bytes flipped, set, taken out, put in, doubled, cut off, or put together with those of ``other``."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(made) + 1)
        length = random.choice((1, 1, 2, 4, 8, 16, random.randrange(1, 200)))
        match random.randrange(8):
            case 0 if at < len(made):
                made[at] ^= 1 << random.randrange(8)
            case 1 if at < len(made):
                made[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 2:
                del made[at : at + length]
            case 3:
                made[at:at] = random.randbytes(length)
            case 4:
                made[at:at] = made[at : at + length] * random.choice((1, 2, 50))
            case 5:
                width = random.choice((1, 2, 4, 8))
                number = random.choice(_NUMBERS) % (1 << 8 * width)
                made[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
            case 6:
                start = random.randrange(len(other) + 1)
                made[at : at + length] = other[start : start + length]
            case _:
                del made[at:]
    return bytes(made[:_MOST_BYTES])


def json_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A JSON text with values replaced, dropped, moved, doubled, nested; now and then changed as bytes."""
    if random.random() < 0.1:
        return bytes_changed(random, data, other)
    try:
        value, donor = _loaded(data), _loaded(other)
    except (ValueError, RecursionError):
        return bytes_changed(random, data, other)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        value = _node_changed(random, value, donor)
    return "".join(_dumped(value))[:_MOST_BYTES].encode("utf-8", "surrogatepass")


def lines_changed(mutate: Mutate) -> Mutate:
    """``mutate`` for inputs whose first line says what the rest is for, which stays."""

    def changed(random: Random, data: bytes, other: bytes) -> bytes:
        first, _, rest = data.partition(b"\n")
        return first + b"\n" + mutate(random, rest, other.partition(b"\n")[2])

    return changed


def _loaded(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=_Pairs)


def _places(value: Any) -> Iterator[tuple[list[Any], int]]:
    """Every place of a value in another: the list that holds it, and its number there."""
    stack = [value]
    while stack:
        holder = stack.pop()
        if isinstance(holder, list):
            for at, item in enumerate(holder):
                yield holder, at
                stack.append(item[1] if isinstance(holder, _Pairs) else item)


def _inner(holder: list[Any], at: int) -> Any:
    return holder[at][1] if isinstance(holder, _Pairs) else holder[at]


def _put(holder: list[Any], at: int, value: Any) -> None:
    holder[at] = (holder[at][0], value) if isinstance(holder, _Pairs) else value


def _node_changed(random: Random, value: Any, donor: Any) -> Any:
    places = list(_places(value))
    if not places or random.random() < 0.02:
        return _Raw(random.choice(_TOKENS))
    holder, at = random.choice(places)
    match random.randrange(10):
        case 0 | 1 | 2:
            _put(holder, at, _Raw(random.choice(_TOKENS)))
        case 3:
            del holder[at]
        case 4:
            holder.insert(random.randrange(len(holder) + 1), holder[at])
        case 5:
            _put(holder, at, deepcopy(_inner(*random.choice(list(_places(donor)) or places))))
        case 6:
            other = _inner(*random.choice(places)) if random.random() < 0.5 else [_inner(holder, at)]
            _put(holder, at, deepcopy(other))
        case 7 if isinstance(holder, _Pairs):
            name = random.choice((holder[random.randrange(len(holder))][0], "", "..", "a\nb", "\ud800", "__class__"))
            holder[at] = (name, holder[at][1])
        case 8 if isinstance(_inner(holder, at), list):
            _put(holder, at, _inner(holder, at)[: random.randrange(3)])
        case _:
            number = _inner(holder, at)
            if isinstance(number, int | float):
                number = random.choice((number + 1, number - 1, -number, number * 2, float(number), str(number)))
            _put(holder, at, number)
    return value


def _dumped(value: Any) -> Iterator[str]:
    if isinstance(value, _Raw):
        yield value
    elif isinstance(value, list):
        pairs = isinstance(value, _Pairs)
        yield "{" if pairs else "["
        for number, item in enumerate(value[:5000]):
            yield "," if number else ""
            if pairs:
                yield json.dumps(item[0]) + ":"
            yield from _dumped(item[1] if pairs else item)
        yield "}" if pairs else "]"
    else:
        yield json.dumps(value)


# Opcodes that a stranger might put into a pickle.
_WANTED = ("os system", "posix system", "builtins exec", "builtins getattr", "subprocess Popen", "torch load",
           "_codecs encode", "builtins bytearray", "numpy ndarray", "torch._utils _rebuild_tensor_v2",
           "collections OrderedDict", "argparse Namespace", "pathlib PosixPath", "torch FloatStorage",
           "torch.distributed.tensor DTensor", "numpy.core.multiarray scalar", "torch _C", "a\n b")  # fmt: skip
_OPCODES = (
    *(b"c" + name.replace(" ", "\n", 1).encode() + b"\n" for name in _WANTED),
    *(b"\x8c" + bytes([len(one)]) + one for one in (b"os", b"system", b"touch made")),
    *(b"\x93", b"R", b"b", b"o", b"\x81", b"\x92", b"ios\nsystem\n", b"(", b")", b"}", b"]", b"t", b"u", b"s", b"a"),
    *(b"e", b"2", b"0", b"1", b"Q", b"P1\n", b"h\x00", b"j\xff\xff\xff\xff", b"q\x00", b"r\xff\xff\xff\x7f", b"\x94"),
    *(b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"\x8a\xff"),
    *(b"J\xff\xff\xff\x7f", b"M\xff\xff", b"G" + b"\xff" * 8, b"I" + b"9" * 5000 + b"\n", b"L" + b"9" * 99 + b"L\n"),
    *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x95" + b"\xff" * 8, b"\x97", b"\x98", b"N", b"\x88"),
    *(b".", b"K\x00"),
)  # fmt: skip


def pickle_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A pickle with opcodes put in, taken out, moved and repeated; now and then changed as bytes."""
    if random.random() < 0.2:
        return bytes_changed(random, data, other)
    pieces, donor = _opcodes(data), _opcodes(other)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, length = random.randrange(len(pieces) + 1), random.choice((1, 1, 2, 8))
        match random.randrange(6):
            case 0 | 1:
                pieces[at:at] = random.choices(_OPCODES, k=random.choice((1, 1, 2, 3)))
            case 2:
                del pieces[at : at + length]
            case 3:
                pieces[at:at] = pieces[at : at + length] * random.choice((1, 2, 100))
            case 4:
                start = random.randrange(len(donor) + 1)
                pieces[at : at + length] = donor[start : start + length]
            case _:
                pieces[at : at + 1] = [bytes_changed(random, b"".join(pieces[at : at + 1]), b"")]
    return b"".join(pieces)[:_MOST_BYTES]


def _opcodes(data: bytes) -> list[bytes]:
    starts: list[int] = []
    with suppress(ValueError, OverflowError):  # what was read before is enough
        starts.extend(place or 0 for _, _, place in pickletools.genops(data))
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)] or [data]


# Pieces of templates: what templates have, and what takes long, much memory, or more than a template should get.
_JINJA = (
    *r"""
{{ messages }} ;; {{ m.content }} ;; {% for m in messages %} ;; {% endfor %} ;; {% if m %} ;; {% endif %} ;;
{% for a in range(99999) %} ;; {% macro f(n) %} ;; {{ f(n) }} ;; {% endmacro %} ;; {% set x = x ~ x %} ;;
x * x ;; {% set ns = namespace(x='a') %} ;; {% set ns.x = ns.x ~ ns.x %} ;; {% block a %} ;; {% endblock %} ;;
{% raw %} ;; {{ self.a() }} ;; {{ ''.__class__ }} ;; {{ cycler.__init__.__globals__ }} ;; {% include 'x' %} ;;
{% call f() %} ;; {% import 'os' as os %} ;; {% generation %} ;; {% endgeneration %} ;;
{{ raise_exception(1) }} ;; {% break %} ;; {{ strftime_now('%9999d') }} ;; {{ 9 ** 9 ** 9 }} ;;
{{ 'a' * 99999999 }} ;; {{ '%99999999d' % 1 }} ;; {{ ;; }} ;; |center(99999999) ;; |indent(9999) ;;
|tojson(indent=9999) ;; |batch(9999999) ;; |list ;; |join ;; |sort ;; |map ;; |attr('__class__') ;;
|format(1) ;; |xmlattr ;; |urlize ;; |round(99) ;; |int(base=99) ;; |slice(0) ;; |random ;; {# ;; #} ;;
'\ud800' ;; \N{x} ;; lipsum(9999) ;;  is divisibleby(0) ;; [::0] ;; {{ {}|items }} ;; |unique ;;
{% filter upper %} ;; {% endfilter %} ;; {{ loop(m) }} ;; {% for m in messages recursive %} ;; {{ 1/0 }} ;;
{{ joiner()() }} ;; {{ dict(**{1:2}) }} ;; |groupby(0)
""".strip("\n")
    .replace(" ;;\n", " ;; ")
    .split(" ;; "),
    *("(" * 500, "[" * 500, "-" * 500, "{% if x %}" * 60, "not " * 300, "\x00"),
)
_TOKEN = re.compile(r"\{\{|\}\}|\{%|%\}|\w+|\s+|.", re.DOTALL)


def template_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A template with pieces of others and of ``_JINJA`` in it; now and then changed as bytes."""
    if random.random() < 0.1:
        return bytes_changed(random, data, other)
    pieces: list[str] = _TOKEN.findall(data.decode(errors="replace"))
    donor: Sequence[str] = _TOKEN.findall(other.decode(errors="replace"))
    for _ in range(random.choice((1, 2, 4, 8))):
        at, length = random.randrange(len(pieces) + 1), random.choice((1, 1, 3, 9))
        match random.randrange(4):
            case 0 | 1:
                pieces[at:at] = [random.choice(_JINJA)]
            case 2:
                del pieces[at : at + length]
            case _:
                start = random.randrange(len(donor) + 1)
                pieces[at:at] = donor[start : start + length]
    return "".join(pieces)[:20_000].encode(errors="replace")
