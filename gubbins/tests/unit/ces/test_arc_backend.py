"""Requests of the back end `arc` and its handling of any response, without a CE."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.fake_arex import URL, FakeArex, Handler, RestOf, arc_settings, backend_that_hears, pilots_of
from support.waiting import until

from gubbins.ces import NothingDoneError, Observation, Observed, PilotAtCE
from gubbins.ces.arc.description import describe
from gubbins.ces.arc.rest import ArcRest
from gubbins.ces.arc.xrsl import join, name_in
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus


async def test_states_are_the_current_ones_of_the_ce_and_may_go_backwards() -> None:
    arex = FakeArex({"j": "ACCEPTING"})
    backend = backend_that_hears(arex)
    reasons = [
        "QUEUING",
        "RUNNING",
        "SUBMITTING",
        "RUNNING",
        "OTHER",
        "UNLISTED",
        "EXITINGLRMS",
        "RUNNING",
        "FINISHED",
    ]
    seen = []
    for arex.states["j"] in reasons:
        (found,) = (await backend.poll(pilots_of(arex))).values()
        seen.append(found.state)
    waiting, running, nothing, done = Observed.WAITING, Observed.RUNNING, Observed.NO_NEWS, Observed.DONE
    assert seen == [waiting, running, waiting, running, nothing, nothing, running, running, done]


@pytest.mark.parametrize(
    ("state", "info", "cancelled", "reason"),
    [
        ("FAILED", {"Error": "LRMS error: (3)\nwrong exit code"}, False, "LRMS error: (3) wrong exit code"),
        ("FAILED", {"Error": ["one", "two"]}, False, "one; two"),
        ("FAILED", {"ExitCode": "7"}, False, "exit code 7"),
        ("FAILED", {}, False, "failed, and the CE gives no reason"),
        ("FAILED", {"Error": "x" * 5000}, False, "x" * 300),
        ("FAILED", {"Error": "by request"}, True, "cancelled: by request"),
        ("KILLED", {}, True, "cancelled"),
        ("KILLED", {"Error": "no space"}, False, "killed at the CE: no space"),
        ("WIPED", {}, False, "removed by the CE before its end was seen"),
    ],
)
async def test_a_failed_pilot_has_a_reason(state: str, info: dict[str, Any], cancelled: bool, reason: str) -> None:
    arex = FakeArex({"j": state}, {"j": info})
    pilot = pilots_of(arex)[0]._replace(cancel_requested=cancelled)
    assert await backend_that_hears(arex).poll([pilot]) == {pilot.stamp: Observation(Observed.FAILED, reason)}


async def test_a_held_job_has_this_reason() -> None:
    seen = await backend_that_hears(FakeArex({"j": "HELD"})).poll([PilotAtCE("s", "vo", "x/j")])
    assert seen["s"] == Observation(Observed.WAITING, "held at the CE (HELD)")


async def test_calls_are_in_bulk_and_known_jobs_are_not_searched() -> None:
    arex = FakeArex(dict.fromkeys((f"j{number}" for number in range(1000)), "RUNNING"))
    backend = backend_that_hears(arex)
    assert len(await backend.poll(pilots_of(arex))) == 1000
    await backend.cancel(pilots_of(arex))
    await backend.cleanup([pilot._replace(status=MyPilotStatus.DONE) for pilot in pilots_of(arex)])
    assert arex.asked == ["status"] * 2 + ["kill"] * 2 + ["clean"] * 2
    arex.asked.clear()
    new = [PilotAtCE(f"s{number}", "vo", maybe_submitted=False) for number in range(250)]
    assert all(outcome.reference for outcome in (await backend.submit(new)).values())
    assert arex.asked == ["new"] * 3


async def test_a_pilot_without_a_reference_is_found_among_the_others() -> None:
    arex = FakeArex({"a": "RUNNING", "b": "QUEUING", "c": "FINISHED"}, {"c": {"Name": "lost"}})
    arex.left_out_of_the_first_list = {"c"}  # as a job may be that is just changing its state
    known = pilots_of(arex)[0]
    seen = await backend_that_hears(arex).poll([known, PilotAtCE("lost", "vo"), PilotAtCE("never", "vo")])
    assert seen == {
        known.stamp: Observation(Observed.RUNNING),
        "lost": Observation(Observed.DONE, None, f"{URL}/rest/1.0/jobs/c"),
    }
    outcomes = await backend_that_hears(arex).submit([PilotAtCE("lost", "vo")])
    assert outcomes["lost"].reference == f"{URL}/rest/1.0/jobs/c"
    assert "new" not in arex.asked


@pytest.mark.parametrize("left_out", [set(), {"c"}])
async def test_of_two_jobs_of_one_stamp_one_is_the_pilot_and_the_other_is_killed(left_out: set[str]) -> None:
    infos = {"a": {"Name": "other"}, "b": {"Name": "lost"}, "c": {"Name": "lost"}, "d": {"Name": "slow"}}
    arex = FakeArex(dict.fromkeys("cbad", "QUEUING"), infos)
    arex.left_out_of_the_first_list = left_out | {"d"}
    lost = [PilotAtCE("lost", "vo"), PilotAtCE("slow", "vo")]
    seen = await backend_that_hears(arex).poll(lost)
    assert {stamp: observation.reference for stamp, observation in seen.items()} == {
        "lost": f"{URL}/rest/1.0/jobs/b",
        "slow": f"{URL}/rest/1.0/jobs/d",
    }
    assert arex.killed == ["c"]
    assert (await backend_that_hears(arex).submit(lost[:1]))["lost"].reference == f"{URL}/rest/1.0/jobs/b"
    assert "new" not in arex.asked


async def test_a_second_job_that_cannot_be_killed_is_searched_again() -> None:
    arex = FakeArex(dict.fromkeys("ab", "QUEUING"), {job: {"Name": "lost"} for job in "ab"})
    failures = iter([httpx.Response(500)])

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.params.get("action") == "kill" and (failure := next(failures, None)) is not None:
            return failure
        return arex(request)

    backend = backend_that_hears(handler)
    with pytest.raises(CEUnavailableError, match="500"):
        await backend.poll([PilotAtCE("lost", "vo")])
    assert (await backend.poll([PilotAtCE("lost", "vo")]))["lost"].reference == f"{URL}/rest/1.0/jobs/a"
    assert arex.killed == ["b"]


@pytest.mark.parametrize("responses", [1, 2])
async def test_a_poll_keeps_what_it_knows_when_a_later_request_fails(responses: int) -> None:
    arex = FakeArex(dict.fromkeys((f"j{number:04}" for number in range(1000)), "RUNNING"))
    arex.states["lost"], arex.infos["lost"] = "RUNNING", {"Name": "lost"}

    def some(request: httpx.Request) -> httpx.Response:
        unavailable = request.url.params.get("action") == "status" and arex.asked.count("status") == responses
        return httpx.Response(503) if unavailable else arex(request)

    backend = backend_that_hears(some)
    pilots = [*pilots_of(arex)[:1000], PilotAtCE("lost", "vo")]
    seen = await backend.poll(pilots)
    known = 500 * responses
    states = [Observed.RUNNING] * known + [Observed.NO_NEWS] * (1001 - known)
    assert [seen[pilot.stamp].state for pilot in pilots] == states
    assert "503" in str(backend.warning)


async def test_a_failing_secondary_source_does_not_affect_other_pilots() -> None:
    arex = FakeArex({"a": "RUNNING", "b": "FAILED"})

    def half(request: httpx.Request) -> httpx.Response:
        action = request.url.params.get("action")
        return httpx.Response(503) if action is None or action == "info" else arex(request)

    backend = backend_that_hears(half)
    pilots = [PilotAtCE("sa", "vo", "x/a"), PilotAtCE("sb", "vo", "x/b"), PilotAtCE("lost", "vo")]
    seen = await backend.poll(pilots)
    assert {stamp: each.state for stamp, each in seen.items()} == {
        "sa": Observed.RUNNING,
        "sb": Observed.FAILED,
        "lost": Observed.NO_NEWS,
    }
    assert "503" in str(backend.warning)
    with pytest.raises(CEUnavailableError, match="503"):  # with nothing else to ask about, it is the main source
        await backend_that_hears(half).poll(pilots[2:])


@pytest.mark.parametrize(
    ("response", "states"),
    [
        ({}, {"a": Observed.NO_NEWS, "b": Observed.NO_NEWS}),
        (
            {"job": {"id": "a", "status-code": 200, "state": "RUNNING"}},
            {"a": Observed.RUNNING, "b": Observed.NO_NEWS},
        ),
        (
            {"job": [{"id": "a", "status-code": "500", "reason": "busy"}, {"id": "b", "status-code": 404}]},
            {"a": Observed.NO_NEWS},
        ),
        ({"job": [{"id": "a", "status-code": "200"}, {"id": "b", "status-code": "404"}]}, {"a": Observed.NO_NEWS}),
    ],
)
async def test_a_job_missing_from_an_incomplete_response_is_not_unknown(
    response: Any, states: dict[str, Observed]
) -> None:
    backend = backend_that_hears(lambda _: httpx.Response(201, content=json.dumps(response) if response else b""))
    seen = await backend.poll([PilotAtCE("a", "vo", "x/a"), PilotAtCE("b", "vo", "x/b")])
    assert {stamp: each.state for stamp, each in seen.items()} == states


@pytest.mark.parametrize("code", ["200", "500", None])
async def test_no_second_pilot_is_submitted_while_a_job_has_no_record(code: str | None) -> None:
    arex = FakeArex({"a": "RUNNING"})

    def incomplete(request: httpx.Request) -> httpx.Response:
        if request.url.params.get("action") != "info":
            return arex(request)
        return httpx.Response(201, content=json.dumps({"job": {"id": "a", "status-code": code}}) if code else b"")

    with pytest.raises(CEUnavailableError, match="has no record of job a"):
        await backend_that_hears(incomplete).submit([PilotAtCE("lost", "vo")])
    assert "new" not in arex.asked


async def test_a_reference_of_another_ce_changes_no_state() -> None:
    seen = await backend_that_hears(FakeArex()).poll([PilotAtCE("s", "vo", "sim://../../etc ?")])
    assert seen == {"s": Observation(Observed.NO_NEWS)}


async def test_pilots_submitted_before_a_refusal_keep_their_references() -> None:
    arex = FakeArex()
    arex.refuse_after = 1
    new = [PilotAtCE(f"s{number}", "vo", maybe_submitted=False) for number in range(150)]
    outcomes = list((await backend_that_hears(arex).submit(new)).values())
    assert sum(outcome.reference is not None for outcome in outcomes) == 100
    assert all("403" in (outcome.error or "") for outcome in outcomes[100:])


async def test_an_unknown_outcome_does_not_affect_other_jobs_of_the_call() -> None:
    arex = FakeArex()

    def handler(request: httpx.Request) -> httpx.Response:
        response = arex(request)
        if arex.asked.count("new") == 2:
            raise httpx.ReadTimeout("")
        document = json.loads(response.content)
        del document["job"][7]["id"]
        return httpx.Response(201, json=document)

    new = [PilotAtCE(f"s{number}", "vo", maybe_submitted=False) for number in range(350)]
    backend = backend_that_hears(handler)
    outcomes = await backend.submit(new)
    lost = {7, *range(100, 200), 207, 307}
    assert set(outcomes) == {f"s{number}" for number in range(350)} - {f"s{number}" for number in lost}
    assert all(outcome.reference for outcome in outcomes.values())
    assert "without an id" in str(backend.warning)
    assert "no response within 30 s" in str(backend.warning)


def fails_with(error: Exception) -> Handler:
    def handler(_: httpx.Request) -> httpx.Response:
        raise error

    return handler


def says(code: int, **response: Any) -> Handler:
    return lambda _: httpx.Response(code, **response)


@pytest.mark.parametrize(
    ("handler", "words", "error"),
    [
        (fails_with(httpx.ConnectError("refused")), "refused", NothingDoneError),
        (fails_with(httpx.ReadTimeout("")), "no response within 30 s", CEUnavailableError),
        (fails_with(httpx.ReadError("")), "ReadError", CEUnavailableError),
        (says(500), "500", CEUnavailableError),
        (says(500, extensions={"reason_phrase": b"No more jobs allowed"}), "No more jobs", NothingDoneError),
        (says(302, headers={"location": "https://evil.example.org"}), "302", NothingDoneError),
        (says(303, headers={"location": "https://evil.example.org"}), "303", CEUnavailableError),
        (says(401), "401", NothingDoneError),
        (says(408), "408", CEUnavailableError),
        (says(201, content=b"<html>"), "<html>", CEUnavailableError),
        (says(201, content=b'{"job": []}'), "0 responses to the submission of 1 jobs", CEUnavailableError),
        (says(201, content=b'{"job": [{"status-code": "201", "id": "j"'), "invalid response", CEUnavailableError),
        (says(201, json={"job": {"status-code": "201"}}), "without an id", CEUnavailableError),
        (says(201, json={"job": {"status-code": 201, "id": "../j"}}), "without an id", CEUnavailableError),
        (says(429, headers={"retry-after": "60"}), "429", NothingDoneError),
        (says(503, headers={"retry-after": "60"}, content=b"<html>"), "503", CEUnavailableError),
    ],
)
async def test_a_failed_submission_is_unknown_unless_it_certainly_had_no_effect(
    handler: Handler, words: str, error: type[CEUnavailableError]
) -> None:
    with pytest.raises(CEUnavailableError, match=words) as raised:
        await backend_that_hears(handler).submit([PilotAtCE("s", "vo", maybe_submitted=False)])
    assert raised.type is error
    assert getattr(raised.value, "quota", False) == ("No more jobs" in words)


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_connections_to_a_ce_that_does_not_respond_to_a_tls_handshake_are_closed(tmp_path: Path) -> None:
    (token := tmp_path / "token").write_text("token")
    connections = set()

    class Silent(asyncio.Protocol):
        def connection_made(self, _: object) -> None:
            connections.add(self)

        def connection_lost(self, _: object) -> None:
            connections.remove(self)

    async with await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/arex"
        rest = ArcRest(arc_settings(url=url, token=token, timeout_seconds=0.2))
        with pytest.raises(CEUnavailableError, match=r"no response within 0\.2 s"):
            await rest.list_jobs()
        await until(lambda: not connections, "the connection is closed", 30)
        await rest.close()


async def test_a_full_ce_is_a_quota() -> None:
    full = {"job": {"status-code": "500", "reason": "No more jobs allowed"}}
    backend = backend_that_hears(lambda _: httpx.Response(201, json=full))
    outcome = (await backend.submit([PilotAtCE("s", "vo", maybe_submitted=False)]))["s"]
    assert outcome.quota
    assert "No more jobs allowed" in str(outcome.error)


async def test_a_refused_cancellation_of_the_ce_is_a_warning() -> None:
    response = {"job": {"id": "a", "status-code": "505", "reason": "Failed to cancel job"}}
    backend = backend_that_hears(lambda _: httpx.Response(201, json=response))
    await backend.cancel([PilotAtCE("sa", "vo", "x/a")])
    assert backend.warning == "cannot cancel 1 pilots: ce returned 505 Failed to cancel job"


async def test_a_refusal_does_not_exclude_an_earlier_submission() -> None:
    with pytest.raises(CEUnavailableError, match="403"):
        await backend_that_hears(lambda _: httpx.Response(403)).submit([PilotAtCE("s", "vo")])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["200", "201", "FAILED", "j", "s"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["job", "id", "state", "status-code", "info_document", "ComputingActivity", "Name", "Error"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
_job = st.fixed_dictionaries(
    {"id": st.sampled_from(["j", "k"]) | _json, "status-code": st.sampled_from(["200", "201", "500"]) | _json},
    optional={"state": _json, "info_document": st.fixed_dictionaries({"ComputingActivity": _json}) | _json},
)
_response = st.fixed_dictionaries({"job": _job | st.lists(_job, max_size=3)}) | _json
_bodies = st.lists(
    _response.map(lambda document: json.dumps(document).encode()) | st.binary(), min_size=1, max_size=6
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_bodies, st.sampled_from([200, 201, 201, 404, 500]))
def test_any_response_of_a_ce_is_a_result_or_an_error_of_one_line(bodies: list[bytes], code: int) -> None:
    replies = iter(bodies)

    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(code, content=next(replies, b""))

    reasons: list[str] = []
    pilot = PilotAtCE("s", "vo", f"{URL}/rest/1.0/jobs/j")
    lost = PilotAtCE("s", "vo")

    async def ask() -> None:
        backend = backend_that_hears(handler, keep="none")
        calls: list[Callable[[], Any]] = [
            lambda: backend.submit([lost, PilotAtCE("t", "vo")]),
            lambda: backend.poll([pilot]),
            lambda: backend.poll([lost]),
            lambda: backend.cancel([pilot]),
            lambda: backend.output(pilot),
            lambda: backend.cleanup([lost._replace(status=MyPilotStatus.DONE)]),
        ]
        for call in calls:
            try:
                response = await call()
            except (CEUnavailableError, OutputUnavailableError) as error:
                reasons.append(str(error))
                continue
            if isinstance(response, dict):
                assert response.keys() <= {"s", "t"}
            for seen in response.values() if isinstance(response, dict) else ():
                reason = seen.reason if isinstance(seen, Observation) else seen.error
                assert reason is None or reason.isprintable()

    asyncio.run(ask())
    assert all(error and error.isprintable() for error in reasons)


async def test_only_the_end_of_a_long_file_is_requested() -> None:
    ranges = []

    def handler(request: httpx.Request) -> httpx.Response:
        ranges.append(wanted := request.headers.get("range"))
        content = b"x" * 90 + b"0123456789"
        return httpx.Response(206 if wanted else 200, content=content[90:] if wanted else content)

    assert await RestOf(handler, arc_settings()).read("j", "session/stdout", 10) == b"0123456789"
    assert ranges == [None, "bytes=90-"]


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    st.text("abc09-", min_size=1),
)
def test_no_script_can_inject_attributes_into_its_description(script: str, stamp: str) -> None:
    hostile = {"PILOT_VO": script}
    text = describe(arc_settings(), script, stamp, hostile)
    assert text.isprintable()
    assert name_in(text) == stamp
    assert text.count("(") == text.count(")") == describe(arc_settings(), "true", "s", {}).count("(")
    assert join([text, text]).count(text) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"url": "http://ce.example.org/arex"}, "https"),
        ({"url": "https://user:secret@ce.example.org/arex"}, "https"),
        ({"url": "https://ce.example.org:port/arex"}, "must be of the form"),
        ({"token": None}, "either a certificate or a token"),
        ({"certificate": "/proxy"}, "either a certificate or a token"),
        ({"key": "/key"}, "requires certificate"),
        ({"token": "token"}, "absolute"),
        ({"queue": "a\nb"}, "control characters"),
        ({"attributes": {"jobname": "mine"}}, "derived from other settings"),
        ({"attributes": {"x)(y": "z"}}, "not a name of an xRSL attribute"),
        ({"attributes": {"runtimeenvironment": []}}, "empty"),
        ({"attributes": {"runtimeenvironment": ["a\n"]}}, "control characters"),
        ({"environment": {"A B": "c"}}, "not a name of a variable"),
        ({"scripts": {"vo": "x" * 100_000}}, "too long by"),
        ({"cpus": 0}, "greater"),
    ],
)
def test_unusable_settings_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        arc_settings(**wrong)


async def test_a_renewed_token_is_used_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def handler(request: httpx.Request) -> httpx.Response:
        shown.append(request.headers["authorization"])
        return httpx.Response(200)

    real = httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **how: real(transport=httpx.MockTransport(handler), **how))
    token = tmp_path / "token"
    rest = ArcRest(arc_settings(token=str(token)))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(rest.close)
        for text in ("first\n", "second\n"):
            token.write_text(text)
            await rest.list_jobs()
            await rest.list_jobs()
    assert shown == ["Bearer first"] * 2 + ["Bearer second"] * 2
