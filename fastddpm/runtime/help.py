"""The help of a command: common options by default, all of them by --help-all. Imports no torch.

Help is printed for a copy of the command's dataclass, in which the other options are suppressed, each text is one
paragraph, and a default of None or False is left to the text. Arguments are parsed by the dataclass itself.
"""

import ast
import dataclasses
import functools
import inspect
import operator
import textwrap
import types
import typing
from collections.abc import Collection
from typing import Annotated, Any

import tyro

COMMON_ONLY = "These are the common options; --help-all shows all."


def described(command: Any, default: Any = None, common: Collection[str] | None = None) -> Any:
    """Return a copy of a command's type for printing its help: a dataclass, or a union of them (subcommands).

    `default`: an instance with the default values to print; None: the type's own. `common`: names of the options to
    show, in nested dataclasses too; None: all.
    """
    if typing.get_origin(command) is Annotated:
        inner, *metadata = typing.get_args(command)
        return _annotated(described(inner, default, common), metadata)
    if typing.get_origin(command) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, (described(each, None, common) for each in typing.get_args(command)))
    return _copy(command, default, common) if dataclasses.is_dataclass(command) else command


def _copy(command: Any, default: Any, common: Collection[str] | None) -> type:
    hints, texts = typing.get_type_hints(command, include_extras=True), _texts(command)
    kinds: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(default, field.name) if default is not None else _default(field)
        kind = described(hints[field.name], None if value is dataclasses.MISSING else value, common)
        if kind != hints[field.name]:  # it holds further options
            value = value if value is dataclasses.MISSING else _plain_type(kind)()
        elif common is None or value is dataclasses.MISSING or field.name in common:
            kind = _documented(kind, texts.get(field.name, ""), value)
        else:
            kind = Annotated[kind, tyro.conf.Suppress]
        kinds[field.name] = kind
        if value is not dataclasses.MISSING:
            defaults[field.name] = dataclasses.field(default_factory=functools.partial(_same, value))
    names = {"__annotations__": kinds, "__doc__": command.__doc__, "__module__": command.__module__}
    checks = {"__post_init__": lambda self: None}  # the values are those of the command
    return dataclasses.dataclass(frozen=True)(type(command.__name__, (command,), names | checks | defaults))


def _same(value: Any) -> Any:
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain_type(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _annotated(kind: Any, metadata: Collection[Any]) -> Any:
    return functools.reduce(lambda inner, each: Annotated[inner, each], metadata, kind)


def _documented(hint: Any, text: str, value: Any) -> Any:
    """Return the annotation of an option with its help text and its default."""
    metadata = getattr(hint, "__metadata__", ())
    found: Any = next((each for each in metadata if dataclasses.is_dataclass(each) and hasattr(each, "metavar")), None)
    text = " ".join((getattr(found, "help", None) or text).split())
    unsaid = value not in (None, False, dataclasses.MISSING)  # the texts say what None is, and False is a flag
    plain: Any = tyro.conf.arg()
    settings = dataclasses.replace(
        plain if found is None else found,
        help=text,
        help_behavior_hint=(lambda default: f"(default: {default})") if unsaid else (lambda _: ""),
    )
    others = [each for each in metadata if each is not found]
    pairs = [tyro.conf.FlagCreatePairsOff] if value is False else []  # --no-X is said only where it does something
    return _annotated(_plain_type(hint), [*others, settings, *pairs])


def _texts(command: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, and of those that it derives from."""
    texts: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(command.__mro__)):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # no source is at hand, as in a frozen program
            continue
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = text
    return texts
