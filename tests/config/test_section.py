"""The types of keys: what is taken, what is refused and how, and what a section is afterwards."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, Literal

import pytest

from slurmkit.config.section import (
    AfterValidator,
    BeforeValidator,
    Field,
    Problem,
    Section,
    ValidationError,
    model_serializer,
    model_validator,
)


def _short(value: str) -> str:
    if len(value) > 3:
        raise ValueError(f"{value!r} is long")
    return value.upper()


Short = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(_short)
]


class Inner(Section):
    size: Annotated[int, Field(ge=1, le=9)] = 1
    kind: Literal["a", "b", 3] = "a"

    @model_validator(mode="after")
    def _a_is_small(self) -> Inner:
        if self.kind == "a" and self.size > 4:
            raise ValueError("a is small")
        return self


class Pair(Section):
    left: int
    right: int

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            left, _, right = value.partition("-")
            return {"left": int(left), "right": int(right)}
        return value

    @model_serializer
    def __str__(self) -> str:
        return f"{self.left}-{self.right}"


class Outer(Section):
    name: Short
    inner: Inner = Inner()
    pairs: tuple[Pair, ...] = ()
    two: tuple[float, float] = (0.5, 1.0)
    some: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    either: bool | Short | None = None
    table: dict[Short, int] = {}
    rate: Annotated[float, Field(gt=0, lt=2, allow_inf_nan=False)] = 1.0
    word: Annotated[str, Field(pattern="[a-z]+")] = "x"
    anything: Any = None


GOOD = {
    "name": 12,
    "inner": {"size": 2},
    "pairs": ["1-2", {"left": 3, "right": 4}],
    "two": [1, 0.25],
    "some": ["a"],
    "either": True,
    "table": {"k": 1},
    "rate": 1,
}


def problems(**values: Any) -> list[Problem]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"name": "n", **values})
    return caught.value.problems


def test_values_become_what_their_keys_say_and_survive_as_plain_data() -> None:
    section = Outer.model_validate(GOOD)
    assert (section.name, section.inner, section.pairs[1].right) == ("12", Inner(size=2), 4)
    assert (section.two, type(section.rate), section.table) == ((1.0, 0.25), float, {"K": 1})
    assert section.model_fields_set == GOOD.keys()
    plain = section.model_dump(mode="json")
    assert plain["pairs"] == ["1-2", "3-4"]
    assert plain["inner"] == {"size": 2, "kind": "a"}
    assert plain["two"] == [1.0, 0.25]
    assert section.model_dump(exclude={"name"})["two"] == (1.0, 0.25)
    assert "name" not in section.model_dump(exclude={"name"})
    again = Outer.model_validate(plain)
    assert again == section == pickle.loads(pickle.dumps(section))
    assert again != Outer.model_validate({**GOOD, "rate": 1.5})
    assert Outer.model_validate(section) is section
    assert len({Inner(), Inner(size=1), Inner(size=2)}) == 2
    assert list(Outer.model_fields)[:2] == ["name", "inner"]
    assert Outer.model_fields["inner"].annotation is Inner


def test_a_default_is_nobody_else_s_and_a_section_is_frozen() -> None:
    Outer(name="a").table["x"] = 1
    assert Outer(name="a").table == {}
    with pytest.raises(ValidationError, match="frozen"):
        Outer(name="a").name = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="name"):
        Outer()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "kind", "location", "message"),
    [
        ({"name": None}, "type", "name", "should be a valid string"),
        ({"name": "long"}, "value", "name", "'long' is long"),
        ({"name": "\udcff"}, "type", "name", "should be a valid string"),
        ({"nmae": 1}, "unknown", "nmae", ""),
        ({"inner": {"sise": 1}}, "unknown", "inner.sise", ""),
        ({"inner": 3}, "type", "inner", "should be a valid dictionary or instance of Inner"),
        ({"inner": None}, "type", "inner", "should be a valid dictionary or instance of Inner"),
        ({"inner": {"size": True}}, "type", "inner.size", "should be a valid integer"),
        ({"inner": {"size": 1.0}}, "type", "inner.size", "should be a valid integer"),
        ({"inner": {"size": "1"}}, "type", "inner.size", "should be a valid integer"),
        ({"inner": {"size": 0}}, "type", "inner.size", "should be greater than or equal to 1"),
        ({"inner": {"size": 10}}, "type", "inner.size", "should be less than or equal to 9"),
        ({"inner": {"size": 5}}, "value", "inner", "a is small"),
        ({"inner": {"kind": "c"}}, "type", "inner.kind", "should be 'a', 'b' or 3"),
        ({"inner": {"kind": 3.0}}, "type", "inner.kind", "should be 'a', 'b' or 3"),
        ({"inner": {"kind": []}}, "type", "inner.kind", "should be 'a', 'b' or 3"),
        ({"pairs": "1-2"}, "type", "pairs", "should be a valid tuple"),
        ({"pairs": ["1-2", "x"]}, "value", "pairs.1", "invalid literal"),
        ({"pairs": [{"left": 1}]}, "missing", "pairs.0.right", ""),
        ({"two": [1]}, "type", "two", "should have 2 items"),
        ({"two": [1, "2"]}, "type", "two.1", "should be a valid number"),
        ({"two": [1, True]}, "type", "two.1", "should be a valid number"),
        ({"two": [1, 10**400]}, "type", "two.1", "should be a valid number"),
        ({"some": []}, "empty", "some", ""),
        ({"some": [None]}, "type", "some.0", "should be a valid string"),
        ({"table": [1]}, "type", "table", "should be a valid dictionary"),
        ({"table": {"k": "1"}}, "type", "table.k", "should be a valid integer"),
        ({"table": {"long": 1}}, "value", "table.long", "'long' is long"),
        ({"rate": 0}, "type", "rate", "should be greater than 0"),
        ({"rate": 2}, "type", "rate", "should be less than 2"),
        ({"rate": float("nan")}, "type", "rate", "should be greater than 0"),
        ({"rate": -float("inf")}, "type", "rate", "should be greater than 0"),
        ({"word": "x\n"}, "type", "word", "should match pattern '[a-z]+'"),
    ],
)
def test_what_is_wrong_is_told_with_its_kind_and_place(
    values: dict[str, Any], kind: str, location: str, message: str
) -> None:
    [problem] = problems(**values)
    assert (problem.kind, ".".join(map(str, problem.location))) == (kind, location)
    assert message in problem.message


def test_all_problems_are_told_and_rules_of_a_section_wait_for_its_keys() -> None:
    assert [problem.location for problem in problems(word=1, inner={"size": 99, "x": 1}, two=[])] == [
        ("inner", "size"),
        ("inner", "x"),
        ("two",),
        ("word",),
    ]
    assert [problem.message for problem in problems(either=[])] == [
        "should be a valid boolean",
        "should be a valid string",
    ]
