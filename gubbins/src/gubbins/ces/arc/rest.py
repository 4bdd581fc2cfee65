"""Client of A-REX's REST interface 1.0, with validated responses; each call is for many jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx

from gubbins.ces.protocol import NothingDoneError, batches
from gubbins.ces.site_errors import SiteErrors
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

from .credentials import Identity, fingerprint, read_identity
from .settings import ArcSettings
from .xrsl import join, name_in

SITE_ERRORS = SiteErrors(quota=r"\bno more jobs allowed\b", refusal=r"(?!)")
"""Error messages of A-REX. Results of single jobs have a status code instead."""

_API = "/rest/1.0"
MAX_POLLED = 500
_MAX_INFO = 100
_MAX_READS = 10
_MAX_RESPONSE_BYTES = 64 << 20
# Responses of A-REX without a message.
_ADVICE = {
    401: "it does not accept our credentials",
    403: "not authorized: check that the CE allows this certificate or token",
    404: "not found: check that the URL is that of A-REX",
}


class JobResponse(NamedTuple):
    """Result for one job in a response."""

    code: int  # HTTP status
    reason: str
    job: Mapping[str, Any]  # the complete result


_NO_RESULT = JobResponse(500, "no result", {})  # in an incomplete response


class ArcRest:
    """Connection to one CE, renewed when our credentials change."""

    def __init__(self, settings: ArcSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None
        self._fingerprint: tuple[object, ...] = ()
        self._outdated: list[httpx.AsyncClient] = []  # may still be in use

    async def submit(self, descriptions: Sequence[str]) -> list[JobResponse]:
        """Submit jobs by one request, and return their results in order.

        Raises:
            NothingDoneError: no job was submitted.
            CEUnavailableError: some jobs may have been submitted.
        """
        found = _job_responses(await self._request("?action=new", join(descriptions).encode(), "application/rsl"))
        number = len(descriptions)
        if len(found) == 1 < number and found[0].code >= 400:
            found *= number  # an error of the whole request
        if len(found) != number:
            raise CEUnavailableError(f"{len(found)} responses to the submission of {number} jobs")
        return found

    async def status(self, ids: Sequence[str]) -> dict[str, str]:
        """Get the states of jobs by id, without those that the CE does not know; empty: there is no state."""
        responses = await self._call("status", ids, MAX_POLLED)
        return {job: str(response.job.get("state") or "") for job, response in responses.items()}

    async def info(self, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Get the CE's records of jobs (GLUE2 `ComputingActivity`) by id; empty: there is no record."""
        found: dict[str, Mapping[str, Any]] = {}
        for job, response in (await self._call("info", ids, _MAX_INFO)).items():
            document = response.job.get("info_document")
            activity = document.get("ComputingActivity") if isinstance(document, Mapping) else None
            found[job] = activity if isinstance(activity, Mapping) else {}
        return found

    async def kill(self, ids: Sequence[str]) -> list[str]:
        """Kill jobs, and return the errors, without those for unknown jobs."""
        responses = await self._call("kill", ids, MAX_POLLED)
        return [f"{code} {reason}" for code, reason, _ in responses.values() if code >= 400]

    async def clean(self, ids: Sequence[str]) -> None:
        """Remove ended jobs with their session directories."""
        await self._call("clean", ids, MAX_POLLED)

    async def list_jobs(self) -> list[str]:
        """List the ids of all our jobs."""
        return [str(each["id"]) for each in _jobs(await self._request()) if "id" in each]

    async def names(self, ids: Sequence[str]) -> dict[str, str | None]:
        """Get the names of jobs by id, without those that the CE does not know.

        Raises:
            CEUnavailableError: the CE does not return the name of a job.
        """
        info = await self.info(ids)
        if (job := next((job for job, each in info.items() if not each), None)) is not None:
            raise CEUnavailableError(f"{self._settings.url} has no record of job {job}")
        names: dict[str, str | None] = {
            job: name for job, each in info.items() if isinstance(name := each.get("Name"), str) and name
        }
        # The record of a new job has no name yet: read it from the description.
        new = [job for job in info if job not in names]
        for batch in batches(new, _MAX_READS):
            texts = await asyncio.gather(*(self.read(job, "diagnose/description", 1 << 20) for job in batch))
            for job, text in zip(batch, texts, strict=True):
                if text is None:
                    raise CEUnavailableError(f"{self._settings.url} has no description of job {job} yet")
                names[job] = name_in(text.decode(errors="replace"))
        return names

    async def read(self, job: str, path: str, limit_bytes: int) -> bytes | None:
        """Read the last part of a file below a job's URL; None: there is no such file."""
        url = f"/jobs/{job}/{path}"
        tail = await self._tail(url, limit_bytes, {})
        if isinstance(tail, int):
            # A-REX supports only ranges with a start. The file may have grown meanwhile.
            tail = await self._tail(url, limit_bytes, {"Range": f"bytes={tail - limit_bytes}-"})
            assert not isinstance(tail, int)
        return tail

    async def close(self) -> None:
        """Close all connections."""
        for client in (*self._outdated, *([self._client] if self._client else [])):
            await client.aclose()
        self._outdated, self._client = [], None

    async def _call(self, action: str, ids: Sequence[str], batch_size: int) -> dict[str, JobResponse]:
        """Get the results of an action by id, without those of jobs unknown to the CE."""
        responses = dict.fromkeys(ids, _NO_RESULT)
        for batch in batches(ids, batch_size):
            body = json.dumps({"job": [{"id": each} for each in batch]}).encode()
            for response in _job_responses(await self._request(f"?action={action}", body, "application/json")):
                if isinstance(job := response.job.get("id"), str) and job in responses:
                    responses[job] = response
        return {job: response for job, response in responses.items() if response.code != 404}

    async def _request(self, query: str = "", body: bytes | None = None, content_type: str = "") -> bytes:
        headers = {"Content-Type": content_type} if content_type else {}
        async with self._stream(f"/jobs{query}", headers, body) as response:
            _accept(response)
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _MAX_RESPONSE_BYTES:
                    raise CEUnavailableError(f"a response of more than {_MAX_RESPONSE_BYTES >> 20} MiB")
            return bytes(content)

    async def _tail(self, path: str, limit_bytes: int, headers: Mapping[str, str]) -> bytes | int | None:
        """Read the last part of a file; or its size if it is larger; None: there is no such file."""
        async with self._stream(path, headers) as response:
            if response.status_code in (404, 416):
                return None
            _accept(response)
            size = response.headers.get("content-length", "")
            if not headers and size.isdecimal() and int(size) > limit_bytes:
                return int(size)
            tail = bytearray()
            async for part in response.aiter_bytes():
                tail += part
                del tail[:-limit_bytes]
            return bytes(tail)

    @contextlib.asynccontextmanager
    async def _stream(
        self, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a POST request if there is a body, or else a GET request."""
        client = await self.connect()
        url, seconds = self._settings.url, self._settings.timeout_seconds
        method = "GET" if body is None else "POST"
        try:
            # Later than httpx's own, as httpx closes no connection whose TLS handshake is cancelled.
            async with asyncio.timeout(seconds + 1):
                target = f"{url}{_API}{path}"
                async with client.stream(method, target, content=body, headers=dict(headers)) as response:
                    yield response
        except (TimeoutError, httpx.TimeoutException) as error:
            raise CEUnavailableError(f"{url}: no response within {seconds:g} s") from error
        except httpx.HTTPError as error:
            kind = NothingDoneError if isinstance(error, httpx.ConnectError) else CEUnavailableError
            raise kind(f"{url}: {one_line(error)}") from error

    async def connect(self) -> httpx.AsyncClient:
        """Return the HTTP client, a new one if the credentials have changed."""
        current = await asyncio.to_thread(fingerprint, self._settings)
        if self._client is None or current != self._fingerprint:
            identity = await asyncio.to_thread(read_identity, self._settings)
            if self._client is not None:
                self._outdated.append(self._client)
            self._client, self._fingerprint = self._make_client(identity), current
        return self._client

    def _make_client(self, identity: Identity) -> httpx.AsyncClient:
        headers = {"Accept": "application/json"}
        if identity.token is not None:
            headers["Authorization"] = f"Bearer {identity.token}"
        # No redirects and no proxies of the environment: a token is for this server only.
        return httpx.AsyncClient(
            verify=identity.context,
            headers=headers,
            timeout=self._settings.timeout_seconds,
            trust_env=False,
            follow_redirects=False,
        )


def _accept(response: httpx.Response) -> None:
    code = response.status_code
    if code < 300:
        return
    status = f"{code} {response.reason_phrase}".strip()
    if advice := _ADVICE.get(code):
        status = f"{status} ({advice})"
    message = one_line(f"{response.url.host} returned {status}")
    outcome = SITE_ERRORS.outcome(message)
    # Also a redirection, which is not followed; other than 303, the response to a request that was executed.
    done = outcome is None and (code >= 500 or code in (303, 408))
    error = CEUnavailableError(message) if done else NothingDoneError(message)
    if isinstance(error, NothingDoneError):
        error.quota = outcome is not None and outcome.quota
    error.requested_pause_seconds = _retry_after(response.headers.get("retry-after", ""))
    raise error


def _retry_after(value: str) -> float:
    """Parse the header `Retry-After`, a number of seconds or a date (RFC 9110); 0: it is missing or invalid."""
    if value.isascii() and value.isdecimal():
        return float(value[:20])
    try:
        return max(0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0


def _jobs(content: bytes) -> list[Mapping[str, Any]]:
    """Parse the jobs of a response, which is empty for none, and has an object instead of a list for one."""
    if not content.strip():
        return []
    try:
        document = json.loads(content)
        jobs = document["job"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CEUnavailableError(f"invalid response: {content[:80]!r}") from error
    jobs = jobs if isinstance(jobs, list) else [jobs]
    if not all(isinstance(each, Mapping) for each in jobs):
        raise CEUnavailableError(f"invalid response: {content[:80]!r}")
    return jobs


def _job_responses(content: bytes) -> list[JobResponse]:
    found = []
    for job in _jobs(content):
        code = str(job.get("status-code"))
        if not (code.isascii() and code.isdecimal() and len(code) == 3):
            raise CEUnavailableError(f"invalid response without a status: {str(job)[:80]}")
        found.append(JobResponse(int(code), one_line(job.get("reason") or "") or "no reason given", job))
    return found
