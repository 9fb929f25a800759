"""From a config file's knobs to the frozen dataclasses that the code reads. A knob that nothing reads is an error."""

import dataclasses
import difflib
import math
import os
import types
import typing
from typing import Annotated, Any, TypeVar

import numpy as np

from walt_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number in a field's annotation: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float = math.inf


Positive = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
NUMBER = Range(0)  # of knobs that have no other: nothing here is negative


def build(cls: type[T], knobs: Any, where: str) -> T:
    """Makes the dataclass `cls` from `knobs`.

    Args:
        cls: a dataclass; its fields may be dataclasses, or `dict[str, SomeDataclass]`.
        knobs: a mapping from field names to values.
        where: the config path of `knobs`, for messages, such as "config.tokenizer".

    Raises:
        UserError: if a knob is read by nothing, one is missing, a value's type is wrong, or the dataclass refuses the
            values.
    """
    if not hasattr(knobs, "items"):
        raise UserError(f"{where} is {knobs!r}; it should be a group of knobs ({', '.join(_names(cls))}).")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in knobs.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(_names(cls))}."
            raise UserError(f"{where}.{name} is read by nothing; {hint}")
        values[name] = _convert(hints[name], value, f"{where}.{name}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UserError(f"{where}.{field.name} is missing; add it to the config file.")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def plain(value: Any, where: str) -> Any:
    """A config file's value as JSON has it: NumPy's numbers and arrays and paths are converted.

    Args:
        value: a knob, or a group of knobs.
        where: its place, for messages, such as "config.data".

    Raises:
        UserError: if it is something that JSON has no form for, such as a function or a set.
    """
    if hasattr(value, "items"):
        return {str(name): plain(entry, f"{where}.{name}") for name, entry in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [plain(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{where} is a {type(value).__name__}; write a number, a string, a list or a group of knobs.")


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _named(options: list[type], value: Any, where: str) -> type:
    """Of dataclasses that differ in `block`, the one that a group of knobs names; the first where it names none."""
    names = {typing.get_args(typing.get_type_hints(option)["block"])[0]: option for option in options}
    name = value.get("block", next(iter(names))) if hasattr(value, "get") else next(iter(names))
    if name not in names:
        raise UserError(f"{where}.block is {name!r}; choose {' or '.join(names)}.")
    return names[name]


def _convert(hint: Any, value: Any, where: str, bounds: Range = NUMBER) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, bounds = typing.get_args(hint)
        return _convert(inner, value, where, bounds)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{where} is {value!r}; choose {' or '.join(map(str, typing.get_args(hint)))}.")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is dict:
        if not hasattr(value, "items"):
            raise UserError(f"{where} is {value!r}; it should be a group of named entries.")
        return {key: _convert(typing.get_args(hint)[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"{where} is {value!r}; it should be a list.")
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) != len(value):
            raise UserError(f"{where} has {len(value)} entries; it should have {len(inner)}.")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        if not any(map(dataclasses.is_dataclass, options)):  # one value, or several
            several = isinstance(value, tuple | list)
            fitting = [option for option in options if (typing.get_origin(option) is tuple) == several]
            return _convert((fitting or options)[0], value, where)
        return _convert(_named(options, value, where) if len(options) > 1 else options[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}; it should be of type {hint.__name__}.")
    if hint in (int, float) and not bounds.low <= value <= bounds.high:
        most = "" if bounds.high == math.inf else f" and at most {bounds.high:g}"
        raise UserError(f"{where} is {value!r}; it should be at least {bounds.low:g}{most}.")
    return value
