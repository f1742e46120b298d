"""Fields of diffusers' configurations: read with their defaults, checked, and named in errors."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastddpm.errors import DataError, UsageError

VERSION = "0.42.1"  # the version of diffusers that the fields and defaults are from


@dataclass(frozen=True)
class Needed:
    """A field that must have one of `values`. `default`: the value that diffusers assumes if the field is missing.

    `why`: the reason, for a message, where it is not plain.
    """

    default: Any
    values: tuple[Any, ...]
    why: str = ""


def fields_of(
    data: Any, needed: Mapping[str, Needed], read: Mapping[str, Any], where: str, *, own: Collection[str] = ()
) -> dict[str, Any]:
    """Return the values of the fields `read`, by default those of `read`.

    Raises `DataError`, naming each of the fields `needed` that has another value. Warns of fields that are in neither,
    nor in `own`, whose values do not matter.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where} must be a JSON object; got {type(data).__name__}")
    refused = []
    for name, need in needed.items():
        value = data.get(name, need.default)
        if not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in need.values
        ):
            came = repr(value) if name in data else f"nothing, for which diffusers assumes {value!r}"
            why = need.why and f", {need.why}"
            refused.append(f"{name} must be {' or '.join(map(repr, need.values))}{why}; got {came}")
    if refused:
        raise DataError(f"{where} describes a network or process that fastddpm does not support: {'; '.join(refused)}")
    unknown = [name for name in data if not (name in needed or name in read or name in own or name.startswith("_"))]
    if unknown:
        warnings.warn(f"{where}: unknown fields are ignored: {', '.join(unknown)}", stacklevel=5)
    return {name: data.get(name, default) for name, default in read.items()}


def build(cls: type, where: str, **values: Any) -> Any:
    """Return the configuration `cls` of `values`. Raises `DataError` for impossible ones."""
    integers = ("image_channels", "width", "blocks", "groups", "num_classes", "timesteps")
    for name in integers:
        if name in values and type(values[name]) is not int:
            raise DataError(f"{where}: {name} must be an integer; got {values[name]!r:.100}")
    try:
        return cls(**values)
    except (UsageError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error


def choice(values: Mapping[str, Any], name: str, table: Mapping[str, str], where: str) -> str:
    """Return our word for a field's value. Raises `DataError`, listing theirs, for another one."""
    if not isinstance(values[name], str) or values[name] not in table:
        raise DataError(f"{where}: {name} must be one of {', '.join(table)}; got {values[name]!r:.100}")
    return table[values[name]]


def inverse(table: Mapping[str, str], name: str, value: str) -> str:
    """Return their word for our `value`. Raises `UsageError`, listing ours, if they have none."""
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    raise UsageError(f"diffusers cannot express {name} {value}; it knows {', '.join(dict.fromkeys(table.values()))}")
