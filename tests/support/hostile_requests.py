"""Hostile HTTP requests, and a check that all inputs are bounded."""

from __future__ import annotations

__all__ = ["HOSTILE", "hostile_addresses", "hostile_bodies", "quoted", "unbounded_in"]

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

HOSTILE = [
    *("", " ", "x" * 20_000, "\0", "\ud800", "💩", "9" * 400, "-1", "nan", "1e400", "../../etc/passwd", "%00"),
    *("' OR 1=1 --", "{{7*7}}", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1-1", "99999999999-9"),
]
HOSTILE_JSON = [*HOSTILE, None, True, -1, 10**400, 2**31, 1e308, [], {}, [[]], ["x"] * 2_000, {"a": {"b": []}}]


def quoted(text: str) -> str:
    """A value in an address, halves of characters included."""
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def unbounded_in(whole: dict[str, Any]) -> Iterator[str]:
    """Yield the unbounded inputs of an application by its OpenAPI schema."""
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                yield from _unbounded(parameter["schema"], whole, f"{method} {path} {parameter['name']}")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from _unbounded(content["schema"], whole, f"{method} {path} body")


def _unbounded(schema: dict[str, Any], whole: dict[str, Any], place: str) -> Iterator[str]:
    """Yield the places of unbounded values."""
    if "$ref" in schema:
        schema = whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        yield from _unbounded(part, whole, place)
    if "enum" in schema or "const" in schema:
        return
    match schema.get("type"):
        case "string" if "maxLength" not in schema and schema.get("format") != "date-time":
            yield f"{place}: a text without a longest length"
        case "integer" | "number" if "maximum" not in schema or "minimum" not in schema:
            yield f"{place}: a number without a range"
        case "array":
            if "maxItems" not in schema:
                yield f"{place}: a list without a longest length"
            yield from _unbounded(schema["items"], whole, f"{place}[]")
        case "object":
            for name, each in schema.get("properties", {}).items():
                yield from _unbounded(each, whole, f"{place}.{name}")


def hostile_addresses(whole: dict[str, Any], **values: str) -> Iterator[str]:
    """Addresses to be got, each with one parameter that is hostile.

    Args:
        values: what stands for the parameters of a path otherwise.
    """
    for path, methods in whole["paths"].items():
        for parameter in methods.get("get", {}).get("parameters", ()):
            for value in HOSTILE:
                if parameter["in"] == "path":
                    yield re.sub(r"\{\w+\}", quoted(value) or "%20", path)
                else:
                    yield f"{_filled(path, values)}?{parameter['name']}={quoted(value)}"


def hostile_bodies(whole: dict[str, Any], **values: str) -> Iterator[tuple[str, str]]:
    """Addresses with bodies to be posted, each body hostile as a whole or in one field."""
    for path, methods in whole["paths"].items():
        for content in methods.get("post", {}).get("requestBody", {}).get("content", {}).values():
            bodies: list[Any] = [*HOSTILE_JSON]
            for name, field in _fields(content["schema"], whole).items():
                bodies += [{name: value} for value in HOSTILE_JSON]
                if _is_list(field):
                    bodies += [{name: [value]} for value in HOSTILE_JSON]
            for body in bodies:
                yield _filled(path, values), json.dumps(body)


def _fields(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Name of each field of a body -> its schema."""
    if "$ref" in schema:
        schema = whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    found = dict(schema.get("properties", {}))
    for part in schema.get("anyOf", ()):
        found |= _fields(part, whole)
    return found


def _is_list(field: dict[str, Any]) -> bool:
    return field.get("type") == "array" or any(map(_is_list, field.get("anyOf", ())))


def _filled(path: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], "1"), path)
