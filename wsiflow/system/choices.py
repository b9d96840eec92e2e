"""A setting whose values are the names of a table."""

from collections.abc import Collection
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticKnownError, core_schema


class OneOf:
    """Accepts the names of a table, as `typing.Literal` accepts its own: ``Annotated[str, OneOf(TABLE)]``."""

    def __init__(self, table: Collection[str]) -> None:
        """Remember the table, which is looked at when there is a value."""
        self._table = table

    def __get_pydantic_core_schema__(
        self, _source: type[Any], _handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Return what accepts the names."""
        return core_schema.no_info_plain_validator_function(self._known)

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return what forms show."""
        return {"enum": list(self._table), "type": "string"}

    def _known(self, value: Any) -> str:
        names = list(self._table)
        if value not in names:
            *first, last = map(repr, names)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return str(value)
