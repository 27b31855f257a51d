"""Options that are written once: a dataclass's fields become flags, checks and a JSON Schema.

class Options:
    samples: int = flag(128, "windows of text", "calibration", least=1)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Flag:
    """What a field is called, said to be, and allowed to be on the command line.

    allowed: all values, or all members of a list; a range stands for its ends. least: a number's.
    """

    help: str
    group: str | None
    name: str | None
    metavar: str | None
    allowed: Sequence[Any] | None
    least: int | None


def flag(
    default: Any,
    help: str,
    group: str | None = None,
    *,
    name: str | None = None,
    metavar: str | None = None,
    allowed: Sequence[Any] | None = None,
    least: int | None = None,
) -> Any:
    """A dataclass's field with a flag; `name` where the flag is not the field's name."""
    described = Flag(help, group, name, metavar, allowed, least)
    return field(default=default, metadata={"flag": described})


def add_flags(
    parser: argparse.ArgumentParser, options: type, without: Collection[str] = ()
) -> None:
    """Add the flags of a dataclass, group by group; each sets its field's name."""
    groups: dict[str | None, Any] = {None: parser}
    for name, described, kind, default in _flags(options):
        if name in without:
            continue
        if described.group not in groups:
            groups[described.group] = parser.add_argument_group(described.group)
        how: dict[str, Any] = {"default": default, "help": described.help, "dest": name}
        if kind is bool:
            how["action"] = "store_true"
        elif get_origin(kind) is tuple:
            how["metavar"] = described.metavar
            of_words = get_args(kind)[0] is str
            how |= {"action": "append", "default": []} if of_words else {"type": integers}
        else:
            how |= {"metavar": described.metavar, "type": kind}
            if kind is str:
                how["choices"] = described.allowed
        groups[described.group].add_argument(described.name or "--" + name.replace("_", "-"), **how)


def from_flags(options: Callable[..., Any], parsed: argparse.Namespace) -> Any:
    """The options that a command line asked for."""
    given = {f.name: getattr(parsed, f.name) for f in fields(options) if hasattr(parsed, f.name)}  # type: ignore[arg-type]
    return options(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def not_allowed(options: Any, names: Sequence[str]) -> list[str]:
    """A sentence for each of the named fields whose value is none of those allowed."""
    values = {name: (getattr(options, name), _flag_of(options, name).allowed) for name in names}
    return [
        f"{name} is {value!r}, allowed are {list(allowed or ())}"
        for name, (value, allowed) in values.items()
        if value not in (allowed or ())
    ]


def too_small(options: Any) -> list[str]:
    """A sentence for each number below its least, and for each that is no finite one."""
    return [
        f"{name} is {value}, needs at least {described.least}"
        for name, described, _, _ in _flags(type(options))
        if described.least is not None and (value := getattr(options, name)) is not None
        if not (math.isfinite(value) and value >= described.least)
    ]


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
    names = {float: "number", int: "integer", str: "string", bool: "boolean"}
    found: dict[str, Any] = {"type": names[kind]}
    if isinstance(described.allowed, range):
        found |= {"minimum": described.allowed[0], "maximum": described.allowed[-1]}
    elif described.allowed is not None:
        found["enum"] = list(described.allowed)
    if described.least is not None:
        found["minimum"] = described.least
    return found


def _flags(options: type) -> list[tuple[str, Flag, Any, Any]]:
    """Name, flag, type and default of every field that has a flag."""
    types = get_type_hints(options)
    described = [(f, f.metadata.get("flag")) for f in fields(options)]
    return [(f.name, d, _kind(types[f.name]), f.default) for f, d in described if d]


def _flag_of(options: Any, name: str) -> Flag:
    return next(d for n, d, _, _ in _flags(type(options)) if n == name)


def _kind(annotation: Any) -> Any:
    """The type that the command line gives: of `Recipe | str | None`, str."""
    if get_origin(annotation) is tuple:
        return annotation
    members = get_args(annotation) or (annotation,)
    known = [m for m in members if m in (float, int, str, bool) or get_origin(m) is tuple]
    assert len(known) == 1, annotation
    return known[0]


# What a flag's text means


def words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def share_or_word(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def _numbers(kind: Callable[[str], Any], example: str, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as {example}") from None


integers = partial(_numbers, int, "1,2,3")
numbers = partial(_numbers, float, "1.5,2,3")
