"""Writes the reference of the settings of tasks, `docs/reference/configuration.md`, from the models.

A test says when the page is not what this would write; then `python docs/hooks/configuration.py`, or `make docs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diracx.tasks.plumbing.config import (
    LimitConfig,
    ObjectLimits,
    PeriodicTaskConfig,
    TaskInstance,
    TaskOverride,
    TasksConfig,
)
from pydantic import BaseModel
from pydantic.fields import FieldInfo

PAGE = Path(__file__).parents[1] / "reference" / "configuration.md"

_INTRODUCTION = """\
# Settings of tasks

<!-- Written by docs/hooks/configuration.py from the models; change those. -->

All that may stand in the YAML file `DIRACX_TASKS_CONFIG`, or in the section `Systems.Tasks` of the DiracX
configuration. How to use it: [Configure tasks](../how-to/configure.md). From Python: [Configuration](config.md).

Only what is written counts; everything else is as in the code, which is also what `null` means. Numbers are
numbers: `"10"` and `true` are refused.
"""

#: Title and model of each section, in the order of the page.
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("The top", TasksConfig),
    ("A task", TaskOverride),
    ("When a task runs", PeriodicTaskConfig),
    ("An instance of a task", TaskInstance),
    ("Limits of an object type", ObjectLimits),
    ("Numbers of a limit", LimitConfig),
)


def page() -> str:
    """The Markdown of the page."""
    return "\n".join([_INTRODUCTION, *(line for title, model in SECTIONS for line in _section(title, model))])


def _section(title: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{(model.__doc__ or '').strip()}\n"
    yield "| setting | type | unit | default | example | |"
    yield "|---|---|---|---|---|---|"
    schema = model.model_json_schema()
    for name, info in model.model_fields.items():
        extra = info.json_schema_extra
        assert isinstance(extra, Mapping), f"{model.__name__}.{name} has no description"
        cells = (
            f"`{name}`",
            _type(schema["properties"][name], schema.get("$defs", {}), list(extra["keys"])),  # type: ignore[arg-type]
            extra["unit"] or "",
            _default(info, str(extra["stands_for"])),
            f"`{_yaml((info.examples or [None])[0])}`",
            info.description,
        )
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _type(schema: Mapping[str, Any], models: Mapping[str, Any], keys: list[str]) -> str:
    """The type in words; `keys` are those of the mappings, from the outside in."""
    if "anyOf" in schema:
        schema = next(part for part in schema["anyOf"] if part.get("type") != "null")
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        title = next((title for title, model in SECTIONS if model.__name__ == name), None)
        return _link(title) if title else _type(models[name], models, keys)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        below = _type(inner, models, keys[1:]) if isinstance(inner, Mapping) else "any value"
        return f"{keys[0]} → {below}"
    words = {"boolean": "boolean", "integer": "integer", "number": "number", "string": "text"}[schema["type"]]
    if "minimum" in schema:
        return f"{words} ≥ {schema['minimum']:g}"
    return f"{words} > {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else words


def _link(title: str) -> str:
    return f"[{title[0].lower()}{title[1:]}](#{title.lower().replace(' ', '-')})"


def _default(info: FieldInfo, stands_for: str) -> str:
    return f"`{json.dumps(info.default)}`" if isinstance(info.default, bool) else stands_for


def _yaml(value: Any) -> str:
    """A value as one writes it in YAML, on one line."""
    import yaml

    return (
        yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n...\n").strip()
    )


if __name__ == "__main__":
    PAGE.write_text(page())
