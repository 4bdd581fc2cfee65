"""Settings of an ARC CE."""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gubbins.ces.settings import PILOT_SCRIPT, AbsolutePath, PilotSettings
from gubbins.ces.transports.tokens import TokenSource

from .xrsl import AttributeValue, check_attribute, check_text, pack

# Longest variables that are added to the environment of a script.
_ROOM = {"PILOT_STAMP": "x" * 64, "PILOT_VO": "x" * 256, "PILOT_CE": "x" * 256, "PILOT_API_URL": "x" * 256}
_SECRET = "x" * 64


class ArcSettings(PilotSettings):
    """Settings of an ARC CE."""

    url: str = Field(description="URL of A-REX: https://ce.example.org/arex, or with a port.")
    certificate: AbsolutePath | None = Field(
        default=None, description="File (PEM) of a client certificate, or of a proxy with its key and chain."
    )
    key: AbsolutePath | None = Field(
        default=None, description="File of the private key, without a password; default: the certificate's file."
    )
    token: TokenSource | None = Field(
        default=None,
        description="File of a bearer token, instead of a certificate; or the identity provider that issues one.",
    )
    ca: AbsolutePath | None = Field(
        default=None,
        description="File (PEM) or hashed directory with trusted CAs of the server; default: those of the system.",
    )
    queue: str | None = Field(default=None, description="Queue of the CE; default: chosen by the CE.")
    cpus: int = Field(default=1, ge=1, description="CPUs of a pilot, on one node.")
    memory_mb: int | None = Field(default=None, ge=1, description="Memory per CPU, MB.")
    wall_time_minutes: int | None = Field(default=None, ge=1, description="Limit of the wall time of a pilot.")
    cpu_time_minutes: int | None = Field(default=None, ge=1, description="Limit of the CPU time of a pilot.")
    attributes: dict[str, AttributeValue] = Field(
        default={},
        description="Additional xRSL attributes: a text, a number, a list of texts, or a list of such lists.",
    )
    timeout_seconds: float = Field(
        default=30, gt=0, le=300, allow_inf_nan=False, description="Time limit of one request."
    )
    list_again_seconds: float = Field(
        default=0.3,
        ge=0,
        le=60,
        allow_inf_nan=False,
        description="Time before the second search of jobs that are missing in the CE's list.",
    )

    @field_validator("url")
    @classmethod
    def _https(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            known = parts.scheme == "https" and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            known = False
        if not known or parts.query or parts.fragment or parts.username is not None:
            raise ValueError("must be of the form https://host[:port]/path")
        return url.rstrip("/")

    @field_validator("queue")
    @classmethod
    def _one_line(cls, queue: str | None) -> str | None:
        return queue if queue is None else check_text(queue)

    @field_validator("attributes")
    @classmethod
    def _known_attributes(cls, attributes: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
        for name, value in attributes.items():
            check_attribute(name, value)
        return attributes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.certificate is None) == (self.token is None):
            raise ValueError("give either a certificate or a token")
        if self.key is not None and self.certificate is None:
            raise ValueError("key requires certificate")
        for script in (*self.scripts.values(), *([self.default_script] if self.default_script else [])):
            pack(script, self.environment | _ROOM, _SECRET)
        for payload in self.payloads.values():
            pack(PILOT_SCRIPT, self.environment | _ROOM | {"PILOT_PAYLOAD": payload}, _SECRET)
        return self
