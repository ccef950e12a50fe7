"""Base of all request bodies: strict types, and no field that is accepted and then ignored.

A field nobody knows, or one that others serve and we do not, is refused by name, together with every other problem.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from server.api.explain import MAX_LISTED_PROBLEMS, UNKNOWN_FIELD, UNSUPPORTED_FIELD, reason_of

EXPLAINED = "explained"
"""Type of a problem whose message is already in words for people."""

IsNoOp = Callable[[Any, Mapping[str, Any]], bool]
"""Whether a value of an unsupported field asks for nothing; gets the value and the whole body."""


def problem(message: str, kind: str = EXPLAINED) -> PydanticCustomError:
    """What a validator raises: `message` follows the field's name, as in `temperature must be a number`."""
    return PydanticCustomError(kind, message.replace("{", "(").replace("}", ")"))


def only(*values: object) -> IsNoOp:
    """No-op values of an unsupported field, compared with their types (so that 1 is not true)."""
    return lambda value, _: any(type(value) is type(allowed) and value == allowed for allowed in values)


def never(_value: object, _body: Mapping[str, Any]) -> bool:
    """An unsupported field with no value that does nothing, except null."""
    return False


def _admit_null(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of a body that null is as good as leaving a field out."""
    for name, field in schema.get("properties", {}).items():
        if name in schema.get("required", ()):
            continue
        if "anyOf" in field:
            field["anyOf"] += [] if {"type": "null"} in field["anyOf"] else [{"type": "null"}]
        else:
            field["type"] = [field["type"], "null"]


class StrictBody(BaseModel):
    """A request body or a part of one.

    No coercion: true is no integer, "1" is no number, NaN is refused. A field that is null counts as absent,
    known or not. Fields in `unsupported` may only hold a value that asks for nothing.
    """

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_admit_null,
        protected_namespaces=(),
    )
    unsupported: ClassVar[Mapping[str, IsNoOp]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_foreign_fields(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        problems = [
            InitErrorDetails(type=reason, loc=(name,), input=data[name]) for name, reason in cls._foreign_fields(data)
        ]
        known = {name: value for name, value in data.items() if name in cls.model_fields and value is not None}
        try:
            body = handler(known)
        except ValidationError as error:
            if not problems:
                raise
            for detail in error.errors(include_url=False):
                reason = problem(reason_of(detail))
                problems.append(InitErrorDetails(type=reason, loc=detail["loc"], input=detail["input"]))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return body

    @classmethod
    def _foreign_fields(cls, data: Mapping[str, Any]) -> list[tuple[str, PydanticCustomError]]:
        """Fields that this body may not have, with the reason; at most as many as one message lists."""
        refused: list[tuple[str, PydanticCustomError]] = []
        for name, value in data.items():
            if name in cls.model_fields or value is None or len(refused) == MAX_LISTED_PROBLEMS:
                continue
            is_no_op = cls.unsupported.get(name)
            if is_no_op is None:
                refused.append((name, problem(_unknown_field(name, cls.model_fields), UNKNOWN_FIELD)))
            elif not is_no_op(value, data):
                refused.append((name, problem("is not supported by this server", UNSUPPORTED_FIELD)))
        return refused


def _unknown_field(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name[:64], list(known), n=1)
    return "is not a known field" + (f"; did you mean '{nearest[0]}'?" if nearest else "")


def _refuse_surrogates(value: str) -> str:
    """Lone UTF-16 surrogates can be escaped in JSON but are no Unicode text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise problem("is not valid Unicode: it holds a lone surrogate") from None
    return value


Text = Annotated[str, AfterValidator(_refuse_surrogates)]
"""A string that UTF-8 can carry."""


def at_most(max_length: int) -> BeforeValidator:
    """Refuse a longer list or object before its entries are looked at, so that an absurd one costs nothing."""

    def check(value: Any) -> Any:
        if isinstance(value, Sequence | Mapping) and len(value) > max_length:
            raise problem(f"must have at most {max_length} entries, got {len(value)}")
        return value

    return BeforeValidator(check)
