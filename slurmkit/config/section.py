"""Frozen groups of typed keys, of a job as of a training configuration: what slurmkit needs of pydantic, in its words.

pydantic itself takes 0.1 s to import and to build its validators, most of what a command may take in all. Here types
are looked at when a section is first filled, and a class costs next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from math import isfinite
from operator import ge, gt, le, lt
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

Location = tuple[str | int, ...]
Function = TypeVar("Function")
_REQUIRED: Any = object()


class Problem(NamedTuple):
    """One thing that is wrong. Example: Problem("type", ("ray", "num_cpus"), "should be a valid integer", "four")."""

    kind: str
    """`unknown`, `missing`, `empty`, `value` for what a validator said, or `type` for all that is about the input."""
    location: Location
    message: str
    input: Any


class ValidationError(ValueError):
    """All that is wrong with a section's values."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, each.location))}: {each.message}" for each in problems))
        self.problems = problems


class BeforeValidator(NamedTuple):
    """In Annotated: what a value goes through before its type is checked. It raises ValueError."""

    function: Callable[[Any], Any]


class AfterValidator(NamedTuple):
    """In Annotated: what a value of the right type goes through. It raises ValueError."""

    function: Callable[[Any], Any]


class Field(NamedTuple):
    """In Annotated: bounds of a number, the least length of a tuple, a pattern of a whole text."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None
    pattern: str | None = None
    allow_inf_nan: bool = True

    def tests(self) -> Iterator[tuple[Callable[[Any], bool], str, str]]:
        """What a value of the right type must pass, and the kind and message of the problem if it does not."""
        for bound, holds_with, words in (
            (self.ge, le, "greater than or equal to"),
            (self.gt, lt, "greater than"),
            (self.le, ge, "less than or equal to"),
            (self.lt, gt, "less than"),
        ):
            if bound is not None:
                yield partial(holds_with, bound), "type", f"should be {words} {bound}"
        if not self.allow_inf_nan:
            yield isfinite, "type", "should be a finite number"
        if (length := self.min_length) is not None:
            yield lambda value: len(value) >= length, "empty", f"should have at least {length} items"
        if (pattern := self.pattern) is not None:
            message = f"should match pattern {pattern!r}"
            yield lambda value: re.fullmatch(pattern, value) is not None, "type", message


def model_validator(mode: Literal["before", "after"]) -> Callable[[Function], Function]:
    """A rule of a whole section: a class method that is given the input, or a method of the filled section."""

    def mark(function: Function) -> Function:
        vars(getattr(function, "__func__", function))["_rule"] = mode
        return function

    return mark


def model_serializer(function: Function) -> Function:
    """The method that says what a section is in a dump, if not a dictionary."""
    vars(function)["_rule"] = "dump"
    return function


class Key:
    """What is known of one key of a section."""

    def __init__(self, section: type[Section], name: str, default: Any) -> None:
        self.section, self.name, self.default = section, name, default

    @property
    def fresh(self) -> Any:
        """The default, not shared where somebody could change it."""
        return dict(self.default) if isinstance(self.default, dict) else self.default

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is _REQUIRED

    @property
    def annotation(self) -> Any:
        """The key's type, its validators included."""
        return self.section._types()[self.name]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """A frozen group of keys. Unknown keys and values of another type are refused."""

    model_fields: dict[str, Key] = {}
    _rules: dict[str, tuple[str, ...]] = {"before": (), "after": (), "dump": ()}
    _hints: dict[str, Any] = {}
    _checks: dict[str, Check] = {}

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        named = [name for name in own.get("__annotations__", {}) if not name.startswith("_")]
        cls.model_fields = cls.model_fields | {name: Key(cls, name, own.get(name, _REQUIRED)) for name in named}
        cls._hints, cls._checks = {}, {}
        marked = [(getattr(getattr(each, "__func__", each), "_rule", None), name) for name, each in own.items()]
        cls._rules = {
            mode: (*names, *(name for rule, name in marked if rule == mode)) for mode, names in cls._rules.items()
        }
        # A key whose value is wrong must not be read as its default.
        for name in named:
            if name in own:
                delattr(cls, name)

    def __init__(self, **values: Any) -> None:
        problems: list[Problem] = []
        self._fill(values, (), problems)
        if problems:
            raise ValidationError(problems)

    @classmethod
    def model_validate(cls, value: Any) -> Self:
        """A section of plain data, or the section that is given. ValidationError lists all problems."""
        problems: list[Problem] = []
        found: Self = _section(cls)(value, (), problems)
        if problems:
            raise ValidationError(problems)
        return found

    @classmethod
    def model_construct(cls, **values: Any) -> Self:
        """A section of values that are known to be right."""
        made = cls.__new__(cls)
        made.__dict__.update({name: key.fresh for name, key in cls.model_fields.items()} | values)
        made.__dict__["model_fields_set"] = frozenset(values)
        return made

    @property
    def model_fields_set(self) -> frozenset[str]:
        """The keys that were given, in contrast to those that have their default."""
        given: frozenset[str] = self.__dict__["model_fields_set"]
        return given

    def model_dump(self, mode: Literal["python", "json"] = "python", exclude: Collection[str] = ()) -> dict[str, Any]:
        """Plain data, sections inside as dictionaries; `json` has lists for tuples."""
        return {name: _plain(getattr(self, name), mode) for name in self.model_fields if name not in exclude}

    @classmethod
    def _types(cls) -> dict[str, Any]:
        cls._hints = cls._hints or get_type_hints(cls, include_extras=True)
        return cls._hints

    def _fill(self, values: Mapping[str, Any], location: Location, problems: list[Problem]) -> None:
        cls = type(self)
        if not cls._checks:
            types = cls._types()
            cls._checks = {name: _check(types[name]) for name in cls.model_fields}
        found, before = self.__dict__, len(problems)
        for name, key in cls.model_fields.items():
            if name in values:
                count = len(problems)
                value = cls._checks[name](values[name], (*location, name), problems)
                if len(problems) == count or isinstance(value, Section):
                    found[name] = value
            elif key.default is _REQUIRED:
                problems.append(Problem("missing", (*location, name), "is required", values))
            else:
                found[name] = key.fresh
        for name in values:
            if name not in cls.model_fields:
                problems.append(Problem("unknown", (*location, name), "Extra inputs are not permitted", values[name]))
        found["model_fields_set"] = frozenset(values)
        is_whole = len(problems) == before
        for rule in cls._rules["after"]:
            try:
                getattr(self, rule)()
            except ValueError as error:
                problems.append(Problem("value", location, str(error), values))
            except AttributeError:
                if is_whole:
                    raise  # else the rule asks for a value that is wrong, which has been said

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValidationError([Problem("value", (name,), "the section is frozen", value)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Section) and type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.model_fields)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.model_fields)


Check = Callable[[Any, Location, list[Problem]], Any]


def _plain(value: Any, mode: Literal["python", "json"]) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Section):
        rules = value._rules["dump"]
        return _plain(getattr(value, rules[-1])(), mode) if rules else value.model_dump(mode)
    if isinstance(value, dict):
        return {name: _plain(inner, mode) for name, inner in value.items()}
    if isinstance(value, tuple):
        items = [_plain(inner, mode) for inner in value]
        return items if mode == "json" else tuple(items)
    return value


def _check(kind: Any) -> Check:
    """The function that checks a value against a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _annotated(_check(arguments[0]), arguments[1:])
    if origin in (Union, UnionType):
        return _union([_check(each) for each in arguments if each is not NoneType], NoneType in arguments)
    if origin is Literal:
        shown = ", ".join(map(repr, arguments[:-1])) + f" or {arguments[-1]!r}" if arguments[1:] else repr(arguments[0])
        return _if(lambda value: value in arguments and type(value) in map(type, arguments), f"should be {shown}")
    if origin is tuple:
        return _tuple([_check(each) for each in arguments if each is not ...], is_open=arguments[-1] is ...)
    if origin is dict:
        return _dictionary(*map(_check, arguments))
    if isinstance(kind, type) and issubclass(kind, Section):
        return _section(kind)
    if kind is float:
        return _float
    if kind in _SIMPLE:
        return _if(*_SIMPLE[kind])
    assert kind is Any, f"no check for {kind}"
    return lambda value, location, problems: value


_SIMPLE: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: type(value) is int, "should be a valid integer"),
    str: (lambda value: isinstance(value, str) and _is_unicode(value), "should be a valid string"),
    bool: (lambda value: type(value) is bool, "should be a valid boolean"),
    NoneType: (lambda value: value is None, "should be null"),
}


def _is_unicode(text: str) -> bool:
    """Whether it can be written: an argument that is no UTF-8 reaches Python as half a character."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _float(value: Any, location: Location, problems: list[Problem]) -> Any:
    try:
        if type(value) in (int, float):
            return float(value)
    except OverflowError:
        pass
    problems.append(Problem("type", location, "should be a valid number", value))
    return value


def _if(is_right: Callable[[Any], bool], message: str) -> Check:
    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        if not is_right(value):
            problems.append(Problem("type", location, message, value))
        return value

    return check


def _annotated(inner: Check, extras: tuple[Any, ...]) -> Check:
    before = [each.function for each in reversed(extras) if isinstance(each, BeforeValidator)]
    after = [each.function for each in extras if isinstance(each, AfterValidator)]
    tests = [test for each in extras if isinstance(each, Field) for test in each.tests()]

    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        given, count = value, len(problems)
        try:
            for function in before:
                value = function(value)
            value = inner(value, location, problems)
            if len(problems) > count:
                return value
            for holds, kind, message in tests:
                if not holds(value):
                    problems.append(Problem(kind, location, message, value))
                    return value
            for function in after:
                value = function(value)
        except ValueError as error:
            problems.append(Problem("value", location, str(error), given))
        return value

    return check


def _union(members: list[Check], has_none: bool) -> Check:
    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        if has_none and value is None:
            return None
        refused: list[list[Problem]] = []
        for member in members:
            found: list[Problem] = []
            result = member(value, location, found)
            if not found:
                return result
            refused.append(found)
        # One that it has the shape of is the one that was meant.
        meant = [found for found in refused if all(each[:2] != ("type", location) for each in found)]
        problems += meant[0] if meant else [each for found in refused for each in found]
        return value

    return check


def _tuple(members: list[Check], is_open: bool) -> Check:
    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        if not isinstance(value, tuple | list):
            problems.append(Problem("type", location, "should be a valid tuple", value))
            return value
        if not is_open and len(value) != len(members):
            problems.append(Problem("type", location, f"should have {len(members)} items", value))
            return value
        each = members * len(value) if is_open else members
        return tuple(
            member(item, (*location, index), problems)
            for index, (member, item) in enumerate(zip(each, value, strict=True))
        )

    return check


def _dictionary(key: Check, member: Check) -> Check:
    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        if not isinstance(value, dict):
            problems.append(Problem("type", location, "should be a valid dictionary", value))
            return value
        return {
            key(name, (*location, name), problems): member(item, (*location, name), problems)
            for name, item in value.items()
        }

    return check


def _section(kind: type[Section]) -> Check:
    def check(value: Any, location: Location, problems: list[Problem]) -> Any:
        try:
            for rule in kind._rules["before"]:
                value = getattr(kind, rule)(value)
        except ValueError as error:
            problems.append(Problem("value", location, str(error), value))
            return value
        if isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            message = f"should be a valid dictionary or instance of {kind.__name__}"
            problems.append(Problem("type", location, message, value))
            return value
        made = kind.__new__(kind)
        made._fill(value, location, problems)
        return made

    return check
