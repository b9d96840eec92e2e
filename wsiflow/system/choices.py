"""A setting whose values are the names of a table."""

from collections.abc import Collection
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticKnownError, core_schema


class OneOf:
    """Accepts the names of a table, as `typing.Literal` accepts its own: ``Annotated[str, OneOf(TABLE)]``."""

    def __init__(self, table: Collection[str], *others: str) -> None:
        """Remember the table, which is looked at when there is a value, and names that are accepted besides."""
        self._table, self._others = table, others

    def __get_pydantic_core_schema__(
        self, _source: type[Any], _handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Return what accepts the names."""
        return core_schema.no_info_plain_validator_function(self._known)

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return what forms show."""
        return {"enum": self._names(), "type": "string"}

    def _names(self) -> list[str]:
        return [*self._others, *self._table]

    def _known(self, value: Any) -> str:
        names = self._names()
        if value not in names:
            *first, last = map(repr, names)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return str(value)
