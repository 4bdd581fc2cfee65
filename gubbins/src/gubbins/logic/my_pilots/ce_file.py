"""Parser of the YAML file of compute elements; reports all errors with their paths."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Annotated, Any, TypeGuard

import yaml
from diracx.tasks.plumbing.config.safe_yaml import SafeLoader
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gubbins.ces.registry import problem_of, validate_all_settings
from gubbins.domain.exceptions import CEFileError, CESettingsError
from gubbins.domain.rules import OF_VOS, CERules, VORules
from gubbins.domain.text import one_line

CE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"
"""Pattern of the name of a compute element."""

_NAMES = "names (in quotes where YAML reads something else)"


def _is_mapping_of_mappings(value: object) -> TypeGuard[dict[str, dict[str, Any]]]:
    """True for a non-empty mapping of names to mappings; a missing value, which may be a mistake, is none."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(own, dict) for key, own in value.items())
    )


class CESpec(BaseModel):
    """Specification of a compute element."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "ce01.example.org",
                    "capacity": 20,
                    "success_rate": 0.95,
                    "vos": ["lhcb"],
                    "backend": "simulated",
                    "settings": {"run_seconds": 60},
                    "rules": {"policy": "waiting_jobs", "max_waiting": 10, "vos": {"lhcb": {"share": 2}}},
                }
            ]
        },
    )

    name: str = Field(pattern=CE_NAME, max_length=128, description="Unique name; letters, digits and . _ : -")
    capacity: int = Field(strict=True, ge=0, le=2**31 - 1, description="Slots, shared by all VOs; at least 0.")
    success_rate: float = Field(default=1.0, strict=True, ge=0, le=1, description="Reliability, from 0.0 to 1.0.")
    enabled: bool | None = Field(
        default=None,
        strict=True,
        description="Whether it takes new pilots; left out: as it is, or true when new.",
    )
    vos: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        default=None,
        min_length=1,
        max_length=1_000,
        description="The VOs it serves, as a list, or as a mapping with the settings that differ for each "
        "(account, credentials, queue); left out: all.",
    )
    backend: str = Field(
        default="simulated", max_length=64, description="Back end: an entry point of the group `gubbins.ces`."
    )
    settings: dict[str, Any] = Field(default={}, description="For the back end.")
    rules: CERules = Field(default=CERules(), description="Number of pilots per VO, limits and time-outs.")

    @field_validator("vos", mode="before")
    @classmethod
    def _refuse_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError(f"must be a list, or a mapping of {_NAMES}, each with its settings")
        return value

    @model_validator(mode="before")
    @classmethod
    def _move_vo_settings(cls, entry: Any) -> Any:
        """Move the settings of VOs from `vos` to `settings`."""
        if not isinstance(entry, dict):
            return entry
        own, settings = entry.get("vos"), entry.get("settings", {})
        if not isinstance(settings, dict):
            return entry  # the validation of the field refuses it
        if OF_VOS in settings:
            raise ValueError(f"settings that differ for some VOs belong below `{OF_VOS}` of the entry itself")
        if not _is_mapping_of_mappings(own):
            return entry  # a list, or refused by `_refuse_mapping`
        return {**entry, "vos": list(own), "settings": {**settings, OF_VOS: own}}


class _Loader(SafeLoader):
    """YAML loader that refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Parse a mapping. Its keys are checked here, as `<<` adds keys to it later."""
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                what = f"key {key!r} appears twice" if isinstance(key, Hashable) else "a key must be one word"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            seen.add(key)
        return node


def parse_ce_file(text: str) -> list[CESpec]:
    """Parse a file of compute elements.

    Each of the `queues` of an entry becomes a compute element `name:queue`, with the fields of both.

    Raises:
        CEFileError: lists all errors.
    """
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 # a SafeLoader, by derivation
    except yaml.YAMLError as error:
        raise CEFileError([_yaml_error(error)]) from error
    except RecursionError as error:
        raise CEFileError([("", "it is nested too deeply")]) from error
    if not isinstance(document, dict) or not isinstance(document.get("compute_elements"), list):
        raise CEFileError([("", "the file must have one key, `compute_elements`, with a list below it")])
    problems = [
        (str(key), "unknown field; the only one here is compute_elements")
        for key in document
        if key != "compute_elements"
    ]
    specs: list[CESpec] = []
    first_seen: dict[str, str] = {}
    for at, entry in _entries(document["compute_elements"], problems):
        try:
            spec = CESpec.model_validate(entry)
        except ValidationError as error:
            problems += [_field_error(at, problem) for problem in error.errors()]
            continue
        if spec.name in first_seen:
            problems.append((f"{at}.name", f"{spec.name!r} is already {first_seen[spec.name]}"))
        first_seen.setdefault(spec.name, at)
        try:
            validate_all_settings(spec.backend, spec.settings)
        except CESettingsError as error:
            problems += [(f"{at}.{path}", message) for path, message in error.problems]
        specs.append(spec)
    if problems:
        raise CEFileError(problems)
    return specs


def _entries(given: list[Any], problems: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """Yield entries with their paths; an entry with `queues` is replaced by one for each queue."""
    for index, entry in enumerate(given):
        at = f"compute_elements[{index}]"
        if not isinstance(entry, dict) or "queues" not in entry:
            yield at, entry
            continue
        queues, name = entry["queues"], entry.get("name")
        if not isinstance(name, str):
            problems.append((f"{at}.name", "must be text, to which the names of the queues are added"))
            continue
        if not _is_mapping_of_mappings(queues):
            problems.append((f"{at}.queues", f"must be a mapping of {_NAMES}, each with what is different there"))
            continue
        shared = {field: value for field, value in entry.items() if field != "queues"}
        for queue, own in queues.items():
            path = f"{at}.queues.{queue}"
            if "name" in own:
                problems.append((f"{path}.name", f"its name is {name}:{queue}"))
                continue
            merged = {**shared, **own, "name": f"{name}:{queue}"}
            for field in ("settings", "rules"):
                if all(isinstance(each.get(field, {}), dict) for each in (shared, own)):
                    merged[field] = shared.get(field, {}) | own.get(field, {})
            if isinstance(merged["rules"], dict):
                merged["rules"] = {"grid_ce": name, "queue": queue} | merged["rules"]
            yield path, merged


def _field_error(at: str, problem: Any) -> tuple[str, str]:
    path = at
    for part in problem["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    model: type[BaseModel] = CESpec
    if problem["loc"][:1] == ("rules",):
        model = VORules if "vos" in problem["loc"] else CERules
    return path, problem_of(problem, model)


def _yaml_error(error: yaml.YAMLError) -> tuple[str, str]:
    mark = getattr(error, "problem_mark", None)
    message = one_line(getattr(error, "problem", None) or error)
    return "" if mark is None else f"line {mark.line + 1}", message
