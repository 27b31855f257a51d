"""Options that are written once: a dataclass's fields become flags, checks and a JSON Schema.

class Options:
    samples: int = flag(128, "windows of text", "calibration", least=1)

What is parsed holds the flags that were given and no others, so that one who asks can tell a
default from the same value, asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from mcmoe_vllm.disk import is_integer, is_number


@dataclass(frozen=True)
class Flag:
    """What a field is called, said to be, and allowed to be on the command line.

    allowed: all values, or all members of a list; a range stands for its ends. least, most: a
    number's. names: of which each may have a value of its own.
    """

    help: str
    group: str | None
    name: str | None
    metavar: str | None
    allowed: Sequence[Any] | None
    least: int | None
    most: int | None
    names: Sequence[str] | None


def flag(
    default: Any,
    help: str,
    group: str | None = None,
    *,
    name: str | None = None,
    metavar: str | None = None,
    allowed: Sequence[Any] | None = None,
    least: int | None = None,
    most: int | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """A dataclass's field with a flag; `name` where the flag is not the field's name."""
    described = Flag(help, group, name, metavar, allowed, least, most, names)
    return field(default=default, metadata={"flag": described})


def add_flags(
    parser: argparse.ArgumentParser, options: type, without: Collection[str] = ()
) -> None:
    """Add the flags of a dataclass, group by group; each sets its field's name if it is given."""
    groups: dict[str | None, Any] = {None: parser}
    for name, described, kind, _ in _flags(options):
        if name in without:
            continue
        if described.group not in groups:
            groups[described.group] = parser.add_argument_group(described.group)
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": described.help, "dest": name}
        if kind is bool:
            how["action"] = "store_true"
        elif get_origin(kind) is tuple:
            how["metavar"] = described.metavar
            of_words = get_args(kind)[0] is str
            how |= {"action": "append"} if of_words else {"type": integers}
        elif get_origin(kind) is dict:
            how |= {"metavar": described.metavar, "type": named_integers}
        else:
            how |= {"metavar": described.metavar, "type": kind}
            if kind is str:
                how["choices"] = described.allowed
        groups[described.group].add_argument(described.name or flag_name(name), **how)


def given_flags(options: type, parsed: argparse.Namespace) -> dict[str, Any]:
    """The options that a command line asked for, by their fields; defaults are not among them."""
    held = {f.name: getattr(parsed, f.name) for f in fields(options) if hasattr(parsed, f.name)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in held.items()}


def from_flags(options: Callable[..., Any], parsed: argparse.Namespace) -> Any:
    """The options that a command line asked for, the others as they are by default."""
    return options(**given_flags(options, parsed))  # type: ignore[arg-type]


def flag_name(field: str) -> str:
    """`--group-size` of group_size."""
    return "--" + field.replace("_", "-")


def flag_names(options: type, fields_: Collection[str]) -> str:
    """The flags of fields, as a list for a message."""
    return ", ".join(_flag_of(options, name).name or flag_name(name) for name in fields_)


def differing(options: Any, names: Collection[str]) -> dict[str, Any]:
    """Those of the named fields whose values are not their defaults."""
    defaults = {f.name: f.default for f in fields(options)}
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value != defaults[name]}


def changed_flags(options: Any) -> dict[str, Any]:
    """The fields with a flag whose value is not the default, for JSON; a value that no command line
    can give, such as an object, is left out."""
    changed = differing(options, [name for name, _, _, _ in _flags(type(options))])
    kinds = bool | int | float | str | tuple | dict
    return {name: value for name, value in changed.items() if isinstance(value, kinds)}


def not_allowed(options: Any, names: Sequence[str]) -> list[str]:
    """A sentence for each of the named fields whose value is none of those allowed."""
    values = {
        name: (getattr(options, name), _flag_of(type(options), name).allowed) for name in names
    }
    return [
        f"{name} is {value!r}, allowed are {list(allowed or ())}"
        for name, (value, allowed) in values.items()
        if value not in (allowed or ())
    ]


def wrong_members(options: Any, field: str) -> list[str]:
    """A sentence for each part that is not allowed of a field with a number for each of several
    names, or one for all; None leaves it open."""
    value, described = getattr(options, field), _flag_of(type(options), field)
    names, allowed = described.names or (), list(described.allowed or ())
    if value is None:
        return []
    members = {field: value}
    if isinstance(value, dict):
        members = {f"{field} of {name}": v for name, v in value.items() if name in names}
    wrong = [
        f"{name} is {v!r:.60}, allowed are {allowed}"
        for name, v in members.items()
        if not is_integer(v) or v not in allowed
    ]
    unknown = [name for name in value if name not in names] if isinstance(value, dict) else []
    return wrong + [f"{field} has {name!r:.60}, allowed are {', '.join(names)}" for name in unknown]


def wrong_values(options: Any) -> list[str]:
    """A sentence for each field of a wrong type, and each number out of its range."""
    wrong = []
    for name, described, kind, default in _flags(type(options)):
        value = getattr(options, name)
        if value is None and default is None:
            continue
        if get_origin(kind) is tuple:
            of = get_args(kind)[0]
            if not (isinstance(value, tuple) and all(isinstance(one, of) for one in value)):
                wrong.append(f"{name} is {value!r:.60}, needs a list, of {_WORDS[of]} each")
        elif kind in (int, float):
            wrong += out_of_range(name, value, described.least, described.most, kind)
        elif kind in (str, bool) and not isinstance(value, kind) and described.allowed is None:
            wrong.append(f"{name} is {value!r:.60}, needs {_WORDS[kind]}")
    return wrong


def out_of_range(
    name: str, value: Any, least: float | None, most: float | None, kind: type = int
) -> list[str]:
    """A sentence if a number is none of its kind, not finite or beyond its ends."""
    need = None
    if not (is_integer(value) if kind is int else is_number(value)):
        need = _WORDS[kind]
    elif least is not None and value < least:
        need = f"at least {least}"
    elif most is not None and value > most:
        need = f"at most {most}"
    return [] if need is None else [f"{name} is {value!r:.60}, needs {need}"]


_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}


def json_schema(options: type) -> dict[str, Any]:
    """JSON Schema (2020-12) of a dataclass with flags; a field without a flag is a string."""
    properties: dict[str, Any] = {}
    for f in fields(options):
        properties[f.name] = {"type": "string"}
    for name, described, kind, default in _flags(options):
        value = _value_schema(kind, described)
        if default is None:
            value = {"anyOf": [value, {"type": "null"}]}
        default = list(default) if isinstance(default, tuple) else default
        properties[name] = {"description": described.help, "default": default, **value}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": options.__name__,
        "type": "object",
        "properties": properties,
        "required": [f.name for f in fields(options) if f.default is MISSING],
        "additionalProperties": False,
    }


def _value_schema(kind: Any, described: Flag) -> dict[str, Any]:
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _value_schema(get_args(kind)[0], described)}
    if get_origin(kind) is dict:
        one = _value_schema(int, described)
        each = {"type": "object", "properties": dict.fromkeys(described.names or (), one)}
        return {"anyOf": [one, {**each, "additionalProperties": False}]}
    names = {float: "number", int: "integer", str: "string", bool: "boolean"}
    found: dict[str, Any] = {"type": names[kind]}
    if isinstance(described.allowed, range):
        found |= {"minimum": described.allowed[0], "maximum": described.allowed[-1]}
    elif described.allowed is not None:
        found["enum"] = list(described.allowed)
    if described.least is not None:
        found["minimum"] = described.least
    if described.most is not None:
        found["maximum"] = described.most
    return found


def _flags(options: type) -> list[tuple[str, Flag, Any, Any]]:
    """Name, flag, type and default of every field that has a flag."""
    types = get_type_hints(options)
    described = [(f, f.metadata.get("flag")) for f in fields(options)]
    return [(f.name, d, _kind(types[f.name]), f.default) for f, d in described if d]


def _flag_of(options: type, name: str) -> Flag:
    return next(d for n, d, _, _ in _flags(options) if n == name)


def _kind(annotation: Any) -> Any:
    """The type that the command line gives: of `Recipe | str | None`, str; of
    `dict[str, int] | int | None`, dict[str, int], for which a number stands too."""
    if get_origin(annotation) is tuple:
        return annotation
    members = get_args(annotation) or (annotation,)
    if named := [m for m in members if get_origin(m) is dict]:
        return named[0]
    known = [m for m in members if m in (float, int, str, bool) or get_origin(m) is tuple]
    assert len(known) == 1, annotation
    return known[0]


# What a flag's text means


def words(text: str) -> tuple[str, ...]:
    found = tuple(word for word in text.split(",") if word)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


def share_or_word(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def named_integers(text: str) -> int | dict[str, int]:
    """A number, or one for each of several names: `64` or `a=1,b=2`."""
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    wrong = [f"{n}={v}" if v else n for n, v in pairs if not (n and v.isdecimal() and v.isascii())]
    if text.isdecimal() and text.isascii():
        return int(text)
    names = [name for name, _ in pairs]
    wrong += [f"{name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"{text!r} has {', '.join(wrong)}; give a number such as 64, or NAME=64,NAME=32"
        )
    return {name: int(value) for name, value in pairs}


def _numbers(kind: Callable[[str], Any], example: str, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as {example}") from None


integers = partial(_numbers, int, "1,2,3")
numbers = partial(_numbers, float, "1.5,2,3")
