"""A-REX without a network: responses to the requests of the back end `arc`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from gubbins.ces import CEDescription, PilotAtCE
from gubbins.ces.arc import ArcBackend, ArcSettings
from gubbins.ces.arc.rest import ArcRest

URL = "https://ce.example.org/arex"
Handler = Callable[[httpx.Request], httpx.Response]


def arc_settings(**more: Any) -> ArcSettings:
    return ArcSettings(
        **({"url": URL, "token": "/nowhere", "default_script": "true", "list_again_seconds": 0} | more)
    )


class RestOf(ArcRest):
    """The real client without files of credentials and network."""

    def __init__(self, handler: Handler, settings: ArcSettings) -> None:
        super().__init__(settings)
        self._mock = httpx.AsyncClient(transport=httpx.MockTransport(handler))

    async def connect(self) -> httpx.AsyncClient:
        return self._mock


def backend_that_hears(handler: Handler, **more: Any) -> ArcBackend:
    settings = arc_settings(**more)
    return ArcBackend(CEDescription("ce", 10, 1.0), settings, RestOf(handler, settings))


class FakeArex:
    """Responds like A-REX, with `states` and `infos` by id; records requests."""

    def __init__(
        self, states: dict[str, str] | None = None, infos: dict[str, dict[str, Any]] | None = None
    ) -> None:
        self.states = states or {}
        self.infos = infos or {}
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.refuse_after = 10**9
        self.left_out_of_the_first_list: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        action = request.url.params.get("action") or request.url.path.removeprefix("/arex/rest/1.0")
        self.asked.append(action)
        if action == "/jobs":
            left_out, self.left_out_of_the_first_list = self.left_out_of_the_first_list, set()
            return self._response([{"id": job} for job in self.states if job not in left_out])
        if action == "new":
            return self._submit(request.content.decode())
        jobs = json.loads(request.content)["job"] if request.content else []
        if action == "kill":
            self.killed += [job["id"] for job in jobs]
        if action in ("status", "info"):
            return self._response([self._about(job["id"]) for job in jobs])
        return self._response([{"status-code": "202", "reason": "Queued", "id": job["id"]} for job in jobs])

    def _submit(self, text: str) -> httpx.Response:
        number = text.count("(executable=")
        if self.asked.count("new") > self.refuse_after:
            return httpx.Response(403)
        new = [f"job{len(self.states) + index}" for index in range(number)]
        self.states |= dict.fromkeys(new, "ACCEPTING")
        return self._response([{"status-code": "201", "reason": "Created", "id": job} for job in new])

    def _about(self, job: str) -> dict[str, Any]:
        if job not in self.states:
            return {
                "status-code": "404",
                "reason": "Job not found",
                "id": job,
                "state": "None",
                "info_document": "",
            }
        info = {"ComputingActivity": self.infos.get(job, {"Name": "another user's"})}
        return {"status-code": "200", "reason": "OK", "id": job, "state": self.states[job], "info_document": info}

    @staticmethod
    def _response(jobs: Sequence[Any]) -> httpx.Response:
        if not jobs:
            return httpx.Response(200, content=b"")
        return httpx.Response(201, json={"job": jobs if len(jobs) > 1 else jobs[0]})


def pilots_of(arex: FakeArex) -> list[PilotAtCE]:
    return [PilotAtCE(f"stamp-{job}", "vo", f"{URL}/rest/1.0/jobs/{job}") for job in arex.states]
