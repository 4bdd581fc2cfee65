"""The calls of A-REX's REST interface 1.0, each for many jobs, its answers checked before they are used."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import httpx

from gubbins.ces.judging import SiteWords
from gubbins.ces.transports.tokens import CredentialsError
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

from .credentials import Identity, fingerprint, read_identity
from .settings import ArcSettings
from .xrsl import join, name_in

WORDS = SiteWords(quota=r"\bno more jobs allowed\b", refusal=r"(?!)")
"""Words of A-REX; an inner answer to a submission is an error by its number."""

_API = "/rest/1.0"
_SUBMIT_AT_ONCE = 100
_ASK_AT_ONCE = 500
_DESCRIBE_AT_ONCE = 100
_READ_AT_ONCE = 10
_MAX_ANSWER_BYTES = 64 << 20
# A-REX answers with these, and does not say more.
_ADVICE = {
    401: "it does not accept our credentials",
    403: "it does not know us: see that the CE allows this certificate or token",
    404: "nothing is there: see whether the URL is the one of A-REX",
}


class NotAcceptedError(CEUnavailableError):
    """The CE, or its absence from the URL, has answered a request with a definite no: nothing was done."""


class JobAnswer(NamedTuple):
    """The part of a response about one job."""

    code: int  # as in HTTP
    reason: str
    job: Mapping[str, Any]  # all of it


class ArcRest:
    """One CE, and a connection to it that is made anew when the files of our credentials change."""

    def __init__(self, settings: ArcSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None
        self._fingerprint: tuple[object, ...] = ()
        self._outdated: list[httpx.AsyncClient] = []  # others may be in the middle of a request

    async def submit(self, descriptions: Sequence[str]) -> list[JobAnswer]:
        """Submit jobs; an answer to each, in order.

        Raises:
            NotAcceptedError, CredentialsError: none of them was submitted.
            CEUnavailableError: some may have been.
        """
        answers: list[JobAnswer] = []
        for some in _batches(descriptions, _SUBMIT_AT_ONCE):
            try:
                found = _answers(await self._post("new", join(some).encode(), "application/rsl"))
            except (NotAcceptedError, CredentialsError) as error:
                if not answers:
                    raise
                found = [JobAnswer(500, str(error), {})] * len(some)
            if len(found) == 1 < len(some) and found[0].code >= 400:
                found *= len(some)  # one error about the request itself
            if len(found) != len(some):
                raise CEUnavailableError(f"{len(found)} answers to the submission of {len(some)} jobs")
            answers += found
        return answers

    async def status(self, ids: Sequence[str]) -> dict[str, str]:
        """The states of jobs, by id; those that the CE does not know are left out."""
        answers = await self._about("status", ids, _ASK_AT_ONCE)
        return {job: str(answer.job.get("state")) for job, answer in answers.items() if answer.code == 200}

    async def info(self, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """The CE's records of jobs (GLUE2 `ComputingActivity`), by id."""
        found = {}
        for job, answer in (await self._about("info", ids, _DESCRIBE_AT_ONCE)).items():
            document = answer.job.get("info_document")
            activity = document.get("ComputingActivity") if isinstance(document, Mapping) else None
            if answer.code == 200 and isinstance(activity, Mapping):
                found[job] = activity
        return found

    async def kill(self, ids: Sequence[str]) -> list[str]:
        """Ask for the end of jobs, and return what the CE says of those that it does not kill.

        Those that are unknown stay as they are.
        """
        answers = await self._about("kill", ids, _ASK_AT_ONCE)
        return [f"{code} {reason}" for code, reason, _ in answers.values() if code >= 400 and code != 404]

    async def clean(self, ids: Sequence[str]) -> None:
        """Have jobs that have ended removed, with their session directories."""
        await self._about("clean", ids, _ASK_AT_ONCE)

    async def list_jobs(self) -> list[str]:
        """The ids of all jobs of ours."""
        return [str(each["id"]) for each in _jobs(await self._request("GET", "/jobs")) if "id" in each]

    async def names(self, ids: Sequence[str]) -> dict[str, str | None]:
        """The names of jobs, by id; those that the CE does not know (any more) are left out.

        Raises:
            CEUnavailableError: the CE has a job and does not say what it is.
        """
        told = await self.info(ids)
        names: dict[str, str | None] = {
            job: name for job, each in told.items() if _is_name(name := each.get("Name"))
        }
        # A job that it has just accepted has no name yet in its own records; its description has one.
        new = [job for job in told if job not in names]
        for some in _batches(new, _READ_AT_ONCE):
            texts = await asyncio.gather(*(self.read(job, "diagnose/description", 1 << 20) for job in some))
            for job, text in zip(some, texts, strict=True):
                if text is None:
                    raise CEUnavailableError(f"{self._settings.url} does not say yet what job {job} is")
                names[job] = name_in(text.decode(errors="replace"))
        return names

    async def read(self, job: str, path: str, limit_bytes: int) -> bytes | None:
        """The last part of a file below a job's URL; None: there is none."""
        url = f"/jobs/{job}/{path}"
        first = await self._tail(url, limit_bytes, {})
        if isinstance(first, int):
            # Ends of files cannot be asked for but by their beginnings. It may have grown meanwhile.
            first = await self._tail(url, limit_bytes, {"Range": f"bytes={first - limit_bytes}-"})
            assert not isinstance(first, int)
        return first

    async def close(self) -> None:
        """Give back connections."""
        for client in (*self._outdated, *([self._client] if self._client else [])):
            await client.aclose()
        self._outdated, self._client = [], None

    async def _about(self, action: str, ids: Sequence[str], at_once: int) -> dict[str, JobAnswer]:
        answers: dict[str, JobAnswer] = {}
        for some in _batches(ids, at_once):
            body = json.dumps({"job": [{"id": each} for each in some]}).encode()
            asked = set(some)
            for answer in _answers(await self._post(action, body, "application/json")):
                if isinstance(job := answer.job.get("id"), str) and job in asked:
                    answers[job] = answer
        return answers

    async def _post(self, action: str, body: bytes, content_type: str) -> bytes:
        return await self._request("POST", f"/jobs?action={action}", body, content_type)

    async def _request(
        self, method: str, path: str, body: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        headers = {"Content-Type": content_type} if content_type else {}
        async with self._stream(method, path, headers, body) as response:
            _accept(response)
            answer = bytearray()
            async for part in response.aiter_bytes():
                answer += part
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise CEUnavailableError(f"an answer of more than {_MAX_ANSWER_BYTES >> 20} MiB")
            return bytes(answer)

    async def _tail(self, path: str, limit_bytes: int, headers: Mapping[str, str]) -> bytes | int | None:
        """The last part of a file; its size if that is known to be more; None: there is none."""
        async with self._stream("GET", path, headers) as response:
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
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        client = await self._connect()
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                url = f"{self._settings.url}{_API}{path}"
                async with client.stream(method, url, content=body, headers=dict(headers)) as response:
                    yield response
        except (httpx.HTTPError, TimeoutError) as error:
            raise CEUnavailableError(self._describe(error)) from error

    async def _connect(self) -> httpx.AsyncClient:
        mark = await asyncio.to_thread(fingerprint, self._settings)
        if self._client is None or mark != self._fingerprint:
            identity = await asyncio.to_thread(read_identity, self._settings)
            if self._client is not None:
                self._outdated.append(self._client)
            self._client, self._fingerprint = self._make_client(identity), mark
        return self._client

    def _make_client(self, identity: Identity) -> httpx.AsyncClient:
        headers = {"Accept": "application/json"}
        if identity.token is not None:
            headers["Authorization"] = f"Bearer {identity.token}"
        # Nothing is followed or taken from the environment: a token is for this server alone.
        return httpx.AsyncClient(
            verify=identity.context,
            headers=headers,
            timeout=self._settings.timeout_seconds,
            trust_env=False,
            follow_redirects=False,
        )

    def _describe(self, error: Exception) -> str:
        words = one_line(error)
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            words = f"no answer within {self._settings.timeout_seconds:g} s"
        return f"{self._settings.url}: {words}"


def _accept(response: httpx.Response) -> None:
    code = response.status_code
    if code < 300:
        return
    words = f"{code} {response.reason_phrase}".strip()
    if advice := _ADVICE.get(code):
        words = f"{words} ({advice})"
    message = one_line(f"{response.url.host} answers {words}")
    if (400 <= code < 500 and code not in (408, 425, 429)) or WORDS.outcome(message) is not None:
        raise NotAcceptedError(message)
    raise CEUnavailableError(message)


def _jobs(answer: bytes) -> list[Mapping[str, Any]]:
    """The jobs of an answer: nothing at all stands for none, an object for one."""
    if not answer.strip():
        return []
    try:
        document = json.loads(answer)
        jobs = document["job"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CEUnavailableError(f"an answer that is none: {answer[:80]!r}") from error
    jobs = jobs if isinstance(jobs, list) else [jobs]
    if not all(isinstance(each, Mapping) for each in jobs):
        raise CEUnavailableError(f"an answer that is none: {answer[:80]!r}")
    return jobs


def _answers(answer: bytes) -> list[JobAnswer]:
    found = []
    for job in _jobs(answer):
        code = str(job.get("status-code"))
        if not (code.isascii() and code.isdecimal() and len(code) == 3):
            raise CEUnavailableError(f"an answer without a status: {str(job)[:80]}")
        found.append(JobAnswer(int(code), one_line(job.get("reason") or "") or "no reason given", job))
    return found


def _is_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and bool(name)


def _batches(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
