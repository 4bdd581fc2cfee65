"""Back end `arc` with a real ARC CE; its states are late, so all conformance tests run concurrently."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from diracx.tasks.testing.server import free_port
from support.all_promises import AllPromises
from support.machine import not_for_this_machine
from support.pilot_secrets import Place, assert_only_the_pilot_can_read_its_secret
from support.sites.arc import ArcSite
from support.sites.glewlwyd import Glewlwyd
from support.sites.token_issuer import published
from support.waiting import until

from gubbins.ces import CEDescription, NothingDoneError, Observation, Observed, PilotAtCE, PilotOutput
from gubbins.ces.arc import ArcBackend, ArcSettings
from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.testing.ce_conformance import Scenario, pilot_scripts

# It kills a job in half a minute, and other tests may run on this machine.
pytestmark = [pytest.mark.timeout(480), pytest.mark.event_loops("uvloop")]


class _Promises(AllPromises):
    """Promises of all back ends, and those of this one that wait for pilots to end."""

    many = 10
    call_seconds = 30
    pause_seconds = 5  # A-REX looks at its jobs every 5 s, and each poll opens a connection

    def __init__(self, site: ArcSite, witness: Path) -> None:
        # Its jobs can be held where processes can have files of their own, as they can to know tokens.
        holding = site.holding if site.knows_tokens else None
        super().__init__(witness, down=site.down, hanging=self._frozen, holding=holding)
        self._site = site
        self._timeout_seconds = 30
        self._scripts = pilot_scripts(witness)

    def make_backend(self, scenario: Scenario) -> ArcBackend:
        settings = {"default_script": self._scripts[scenario], "keep": "none"}
        return _Maker(self._site, **settings, timeout_seconds=self._timeout_seconds).make()

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        patient, self._timeout_seconds = self._timeout_seconds, 2
        with self._site.frozen():
            yield
        self._timeout_seconds = patient

    async def test_hostile_values_arrive_as_they_are_and_nothing_else_is_run(self) -> None:
        hostile = (
            'a\'b"c $(touch pwned) `touch pwned` $HOME \\ (* *) )(executable="/bin/false") ^#x# \t ü\nline 2; \''
        )
        script = 'printf %s "$HOSTILE"; echo "$PILOT_CE $PILOT_VO ${GUBBINS_PILOT-clean}" >&2; ls'
        python = f"#!/usr/bin/env python3\nimport os\nprint(os.environ['HOSTILE'] == {hostile!r}, end='')\n"
        make = _Maker(
            self._site,
            scripts={"vo": script, "py": python},
            environment={"HOSTILE": hostile},
            attributes={"rerun": 0, "priority": 50},
            queue="fork",
            memory_mb=100,
            wall_time_minutes=10,
            cpu_time_minutes=10,
        )
        pilots = await make.submit("vo", "py")
        await make.until_ended(pilots)
        out = await make.outputs(pilots)
        assert out["vo"].stdout.startswith(hostile)
        assert "pwned" not in out["vo"].stdout.removeprefix(hostile)
        assert out["vo"].stderr == "ce vo clean\n"
        assert out["py"].stdout == "True"

    async def test_long_output_is_truncated_to_its_end_and_deleted_with_the_pilot(self) -> None:
        scripts = {"good": "seq 0 200000", "bad": "echo no luck >&2; exit 3"}
        make = _Maker(self._site, scripts=scripts)
        pilots = await make.submit("good", "bad")
        seen = await make.until_ended(pilots)
        assert seen["good"] == Observation(Observed.DONE)
        assert seen["bad"].state is Observed.FAILED
        assert "3" in (seen["bad"].reason or "")
        out = await make.outputs(pilots)
        assert out["good"].stdout == "".join(f"{n}\n" for n in range(200_001))[-OUTPUT_LIMIT_BYTES:]
        assert out["bad"].stderr == "no luck\n"

        ends = {"good": MyPilotStatus.DONE, "bad": MyPilotStatus.FAILED}
        async with make() as backend:
            await backend.cleanup([pilot._replace(status=ends[pilot.vo]) for pilot in pilots])
        left = await make.until(pilots, lambda seen: "good" not in seen)
        assert left.keys() == {"bad"}  # failed ones are kept, unless the settings say otherwise
        async with make() as backend:
            with pytest.raises(OutputUnavailableError):
                await backend.output(next(pilot for pilot in pilots if pilot.vo == "good"))


@pytest.fixture
def witness(arc_site: ArcSite) -> Path:
    """A directory that jobs can write to, which run as the user nobody."""
    directory = arc_site.directory / "witness"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o1777)
    return directory


async def test_all_conformance_tests_ran(arc_site: ArcSite, witness: Path) -> None:
    await _Promises(arc_site, witness).check()


async def test_a_refused_description_has_the_message_of_the_ce(arc_site: ArcSite) -> None:
    async with _Maker(arc_site, queue="nonesuch")() as backend:
        outcomes = await backend.submit([_pilot("vo"), _pilot("vo")])
    assert [outcome.reference for outcome in outcomes.values()] == [None, None]
    assert all("nonesuch" in (outcome.error or "") for outcome in outcomes.values())


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_vo_without_a_script_gets_no_pilots_and_does_not_affect_others(arc_site: ArcSite) -> None:
    make = _Maker(arc_site, scripts={"vo": "true"}, default_script=None)
    async with make() as backend:
        pilots = [_pilot("other"), _pilot("vo")]
        outcomes = await backend.submit(pilots)
        assert "no pilot script for other" in (outcomes[pilots[0].stamp].error or "")
        assert outcomes[pilots[1].stamp].reference


async def test_unknown_credentials_are_refused_until_the_file_is_replaced(
    arc_site: ArcSite, tmp_path: Path
) -> None:
    proxy = tmp_path / "proxy.pem"
    certificate, key = arc_site.stranger
    proxy.write_bytes(certificate.read_bytes() + key.read_bytes())
    async with _Maker(arc_site, certificate=proxy, key=None, ca=arc_site.ca_directory)() as backend:
        pilot = _pilot("vo")
        with pytest.raises(CEUnavailableError, match=r"403 .*not authorized"):
            await backend.poll([pilot])
        with pytest.raises(NothingDoneError, match=r"403 .*not authorized"):
            await backend.submit([pilot._replace(maybe_submitted=False)])

        arc_site.make_proxy(proxy)
        assert (await backend.submit([pilot]))[pilot.stamp].reference

        arc_site.make_proxy(proxy, begin="20260101000000Z", seconds=60)
        with pytest.raises(CEUnavailableError, match=r"proxy\.pem has expired at 2026-01-01 00:01:00 UTC"):
            await backend.poll([pilot])

        proxy.unlink()
        with pytest.raises(CEUnavailableError, match=r"proxy\.pem: No such file"):
            await backend.poll([pilot])


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_token_is_accepted_until_it_expires(arc_site: ArcSite, tmp_path: Path) -> None:
    if not arc_site.knows_tokens:
        not_for_this_machine(
            "no mount namespaces, and the ARC CE looks for CAs of token issuers in one place only"
        )
    token = tmp_path / "token"
    async with _Maker(arc_site, certificate=None, key=None, token=token)() as backend:
        token.write_text(arc_site.issuer.make_token() + "\n")
        pilot = _pilot("vo")
        reference = (await backend.submit([pilot]))[pilot.stamp].reference
        assert (await backend.submit([pilot]))[pilot.stamp].reference == reference

        token.write_text(arc_site.issuer.make_token(seconds=-10))
        with pytest.raises(CEUnavailableError, match="token has expired at"):
            await backend.poll([pilot])

        token.write_text("not.a.token")
        with pytest.raises(CEUnavailableError, match="403"):
            await backend.poll([pilot])


async def test_tokens_of_an_identity_provider_are_fetched_for_each_vo(arc_site: ArcSite, tmp_path: Path) -> None:
    """Each VO is a client of its own; a token for another audience is refused by the site."""
    if (obstacle := servers.obstacle("Glewlwyd")) is not None:
        pytest.skip(obstacle)
    if not arc_site.knows_tokens:
        not_for_this_machine(
            "no mount namespaces, and the ARC CE looks for CAs of token issuers in one place only"
        )
    files = (arc_site.directory / "host.pem", arc_site.directory / "host.key")
    named = f"https://localhost:{arc_site.provider_port}/api/oidc"
    provider = Glewlwyd(tmp_path, free_port(), *files, audience=arc_site.url, named_in_tokens=named)
    provider.start()
    # A-REX asks for the whole URL, as one asks a proxy, and Glewlwyd has nothing there: so its keys are published.
    found = {"/api/oidc/.well-known/openid-configuration": {"issuer": named, "jwks_uri": f"{named}/jwks"}}
    try:
        provider.set_up(seconds=600)
        keys = {"/api/oidc/jwks": provider.keys()}
        with published(arc_site.provider_port, *files, found | keys):
            await _each_vo_has_a_token(arc_site, provider, tmp_path)
    finally:
        provider.stop()


async def _each_vo_has_a_token(arc_site: ArcSite, provider: Glewlwyd, tmp_path: Path) -> None:
    for vo in ("lhcb", "dteam"):
        provider.add_client(vo, f"secret of {vo}")
        (tmp_path / vo).write_text(f"secret of {vo}\n")
        token = {"issuer": provider.issuer, "client_id": vo, "client_secret": tmp_path / vo}
        token |= {"audience": arc_site.url, "ca": arc_site.ca_file}
        async with _Maker(arc_site, certificate=None, key=None, token=token)() as backend:
            pilots = [_pilot(vo) for _ in range(3)]
            for pilot in pilots:
                assert (await backend.submit([pilot]))[pilot.stamp].reference
            assert len(await backend.poll(pilots)) == 3
    assert provider.given() == 2
    elsewhere = token | {"audience": None}
    async with _Maker(arc_site, certificate=None, key=None, token=elsewhere)() as backend:
        with pytest.raises(CEUnavailableError, match="403"):
            await backend.poll(pilots)
    wrong = token | {"client_id": "nobody"}
    async with _Maker(arc_site, certificate=None, key=None, token=wrong)() as backend:
        with pytest.raises(CEUnavailableError, match="/token returned 40"):
            await backend.poll(pilots)


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_server_without_a_valid_certificate_gets_nothing(arc_site: ArcSite) -> None:
    async with _Maker(arc_site, ca=arc_site.certificate)() as backend:
        with pytest.raises(CEUnavailableError, match="certificate verify failed"):
            await backend.submit([_pilot("vo")])


class _Maker:
    """Makes back ends for the site, and follows pilots by their VO."""

    def __init__(self, site: ArcSite, **settings: Any) -> None:
        defaults: dict[str, Any] = {"certificate": site.certificate, "key": site.key, "ca": site.ca_file}
        self._settings = ArcSettings(url=site.url, **({"default_script": "true"} | defaults | settings))

    def make(self) -> ArcBackend:
        return ArcBackend(CEDescription("ce", 100, 1.0), self._settings)

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[ArcBackend]:
        backend = self.make()
        try:
            yield backend
        finally:
            await backend.close()

    async def submit(self, *vos: str) -> list[PilotAtCE]:
        pilots = [_pilot(vo) for vo in vos]
        async with self() as backend:
            outcomes = await backend.submit(pilots)
        assert all(outcome.reference for outcome in outcomes.values()), outcomes
        return [pilot._replace(reference=outcomes[pilot.stamp].reference) for pilot in pilots]

    async def until_ended(self, pilots: list[PilotAtCE]) -> dict[str, Observation]:
        ends = (Observed.DONE, Observed.FAILED)
        return await self.until(pilots, lambda seen: all(each.state in ends for each in seen.values()))

    async def until(
        self, pilots: list[PilotAtCE], condition: Callable[[dict[str, Observation]], bool]
    ) -> dict[str, Observation]:
        seen: dict[str, Observation] = {}

        async def observed(backend: ArcBackend) -> bool:
            found = await backend.poll(pilots)
            seen.clear()
            seen.update({pilot.vo: found[pilot.stamp] for pilot in pilots if pilot.stamp in found})
            return condition(seen)

        async with self() as backend:
            await until(lambda: observed(backend), "the pilots are as wanted", 200, pause=1)
        return seen

    async def outputs(self, pilots: list[PilotAtCE]) -> dict[str, PilotOutput]:
        async with self() as backend:
            return {pilot.vo: await backend.output(pilot) for pilot in pilots}


def _pilot(vo: str) -> PilotAtCE:
    return PilotAtCE(uuid.uuid4().hex, vo)


async def test_only_the_pilot_can_read_its_secret(arc_site: ArcSite, caplog: pytest.LogCaptureFixture) -> None:
    where = {"url": arc_site.url, "certificate": str(arc_site.certificate), "key": str(arc_site.key)}
    place = Place("arc", where | {"ca": str(arc_site.ca_file)}, arc_site.directory, pause_seconds=2)
    await assert_only_the_pilot_can_read_its_secret(place, caplog)
