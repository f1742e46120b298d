"""JSON documents: configurations as plain data and back, their differences, and a strict parser. Imports no torch."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fastddpm.errors import DataError, UsageError

from .reading import read_bytes, readable

# Metadata of a field that came after files had been written: while it has its default, documents and checksums are
# without it, so that they are those of before.
LATER = {"stored": "unless default"}


def stored_fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each field of a configuration dataclass that is stored."""
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        if f.metadata.get("stored") != LATER["stored"] or own != f.default:
            yield f.name, own


def to_dict(value: Any) -> Any:
    """Return a configuration dataclass as plain dictionaries and lists, for JSON, without `LATER` defaults."""
    if dataclasses.is_dataclass(value):
        return {name: to_dict(own) for name, own in stored_fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type, data: Any, where: str = "configuration") -> Any:
    """Return the `cls` that `to_dict` made `data` from; missing fields take their defaults.

    `where`: the name of the source in messages. Raises `UsageError`, naming the field, if one is unknown, lacks a value
    and has no default, or has the wrong type.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{where} must be an object; got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UsageError(f"{where} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise UsageError(f"{where} lacks the field {missing[0]!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _parse(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def from_stored(cls: type, data: Any, where: str) -> Any:
    """Return what `from_dict` does for `data` that a file holds: raises `DataError` where that raises `UsageError`."""
    try:
        return from_dict(cls, data, where)
    except UsageError as error:
        raise DataError(str(error)) from error


def difference(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return a line "field: old -> new" for each field in which two configurations of one type differ."""
    lines = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            lines += difference(a, b, f"{prefix}{f.name}.")
        elif a != b:
            lines.append(f"{prefix}{f.name}: {shown(a)} -> {shown(b)}")
    return lines


def shown(value: Any) -> str:
    """Return a value as text; of a tuple of many numbers, only how many and the first."""
    many = isinstance(value, tuple) and len(value) > _MOST_SHOWN
    return f"{len(value):,} numbers from {value[0]}" if many else str(value)


_MOST_SHOWN = 16  # items of a tuple


def _parse(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list; got {value!r:.100}")
        item = typing.get_args(hint)[0]
        return tuple(_parse(item, element, where) for element in value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        wanted = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        lists = [arg for arg in wanted if typing.get_origin(arg) is tuple]
        return _parse((lists if lists and isinstance(value, list) else wanted)[0], value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)):
            raise UsageError(f"{where} must be one of {', '.join(map(str, typing.get_args(hint)))}; got {value!r:.100}")
        return value
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where} must be {hint.__name__}; got {value!r:.100}")
    return value


# Parsed JSON takes up to 50 times its size in memory: these limits keep the worst case near 100 MB.
MAX_JSON_BYTES = 2**21
_JSON_DEPTH = 64
_MAX_DIGITS = 20


def read_json(path: Path) -> Any:
    """Read a JSON document that may be damaged. Raises `FileNotFoundError`, and `DataError` as `parse_json` does.

    Raises `DataError` also for a file that is no regular file or cannot be read.
    """
    with readable(path):
        return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON document that must be an object. Raises as `read_json` does."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object; it holds {type(value).__name__}")
    return value


def parse_json(data: bytes, where: str | Path) -> Any:
    """Parse JSON from an untrusted source. `where`: the name of the source in messages.

    Raises `DataError` for more than 2 MiB or 64 levels, a key given twice, an integer of more than 20 digits, which may
    not fit a float, or malformed text.
    """
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{where}: {len(data):,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; at most {_JSON_DEPTH} levels are read") from None
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    level = [value]
    for _ in range(_JSON_DEPTH + 1):
        if not level:
            break
        level = [
            child for v in level for child in (v.values() if isinstance(v, dict) else v if type(v) is list else ())
        ]
    if level:
        raise DataError(f"{where}: JSON nested too deeply; at most {_JSON_DEPTH} levels are read")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value
