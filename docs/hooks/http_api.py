"""Writes the reference of an HTTP API from its routes.

A page that holds the line `<!-- http: module:attribute /prefix -->` gets there one section for each route of that
router: what it does, its parameters, its responses.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

_MARK = re.compile(r"^<!-- http: (\S+):(\S+) (\S+) -->$", re.MULTILINE)
#: Replacements for FastAPI's default descriptions.
_WORDS = {"Successful Response": "Done", "Validation Error": "Invalid input; the body has the fields and reasons"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _MARK.sub(lambda found: describe(found[1], found[2], found[3]), markdown)


def describe(module: str, attribute: str, prefix: str) -> str:
    """The Markdown of one router."""
    from fastapi.openapi.utils import get_openapi

    router = getattr(import_module(module), attribute)
    schema = get_openapi(title="", version="", routes=router.routes)
    return "\n".join(_sections(schema, prefix))


def _sections(schema: dict[str, Any], prefix: str) -> Iterator[str]:
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"## {method.upper()} {prefix}{path}\n"
            yield f"{inspect.cleandoc(operation.get('description', ''))}\n"
            yield from _parameters(operation)
            yield from _responses(schema, operation)


def _parameters(operation: dict[str, Any]) -> Iterator[str]:
    found = [p for p in operation.get("parameters", []) if p["in"] in ("path", "query")]
    if not found:
        return
    yield "| parameter | | default |\n|---|---|---|"
    for parameter in found:
        default = parameter["schema"].get("default")
        shown = "required" if parameter.get("required") else "" if default is None else f"`{json.dumps(default)}`"
        yield f"| `{parameter['name']}` ({parameter['in']}) | {parameter.get('description', '')} | {shown} |"
    yield ""


def _responses(schema: dict[str, Any], operation: dict[str, Any]) -> Iterator[str]:
    if example := _example(schema, operation.get("requestBody", {})):
        yield f"Body:\n\n```json\n{example}\n```\n"
    yield "| response | |\n|---|---|"
    for code, response in sorted(operation["responses"].items()):
        yield f"| {code} | {_WORDS.get(response['description'], response['description'])} |"
    yield ""
    for code, response in operation["responses"].items():
        if code.startswith("2") and (example := _example(schema, response)):
            yield f"```json\n{example}\n```\n"


def _example(schema: dict[str, Any], message: dict[str, Any]) -> str | None:
    body = message.get("content", {}).get("application/json", {}).get("schema", {})
    is_list = body.get("type") == "array"
    reference = (body.get("items", {}) if is_list else body).get("$ref")
    if reference is None:
        return None
    examples = schema["components"]["schemas"][reference.rpartition("/")[2]].get("examples")
    if not examples:
        return None
    return json.dumps([examples[0]] if is_list else examples[0], indent=2, ensure_ascii=False)
