"""Execution of commands through SSH: host keys, credentials and time-outs."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sites.sshd import Sshd
from support.waiting import eventually

from gubbins.ces import NothingDoneError
from gubbins.ces.transports.ssh import SSHHost, SSHShell
from gubbins.domain.exceptions import CEUnavailableError

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

Shell = Callable[..., SSHShell]


@pytest.fixture
async def shell(sshd: Sshd) -> AsyncIterator[Shell]:
    made: list[SSHShell] = []

    def _shell(**settings: Any) -> SSHShell:
        made.append(SSHShell(SSHHost(**(sshd.settings | settings))))
        return made[-1]

    yield _shell
    for each in made:
        await each.close()


@pytest.fixture
def forgetful(sshd: Sshd, tmp_path: Path) -> Path:
    """A file of known hosts of the test's own."""
    path = tmp_path / "known_hosts"
    path.write_text(sshd.known_hosts.read_text())
    return path


async def test_arguments_and_input_arrive_as_they_are(shell: Shell) -> None:
    words = ["a b", "$(id)", "`id`", "'", '"', "*", "~", "", "-n", "é\n\t", "\\", "!x"]
    done = await shell().run(["printf", "<%s>", *words])
    assert done == (0, "".join(f"<{word}>" for word in words), "")
    done = await shell().run(["/bin/sh", "-c", "cat; echo no >&2; exit 4"], stdin=b"hello\n$x\n", timeout=10)
    assert done == (4, "hello\n$x\n", "no\n")


async def test_commands_have_the_given_environment(sshd: Sshd) -> None:
    ours = SSHShell(SSHHost(**sshd.settings), {"SLURM_CONF": "/a b/$x'"})
    assert (await ours.run(["/bin/sh", "-c", 'printf %s "$SLURM_CONF"'])).stdout == "/a b/$x'"
    await ours.close()


@pytest.mark.parametrize("server", ["sshd", "csh_sshd"])
async def test_output_of_a_login_is_not_part_of_a_result(server: str, request: pytest.FixtureRequest) -> None:
    sshd: Sshd = request.getfixturevalue(server)
    noise = sshd.home / ".bashrc"
    noise.write_text("echo Welcome; echo Welcome >&2; trap 'echo Bye' EXIT\n")
    sshd.banner.write_bytes("Zugang nur für Befugte\n".encode("latin-1"))
    ours = SSHShell(SSHHost(**sshd.settings), {"WORD": "it's !x $HOME\n{}"})
    try:
        script = 'printf "%s" "$WORD$1"; cat; echo no >&2; exit 5'
        done = await ours.run(["/bin/sh", "-c", script, "sh", "a'b\n!c"], stdin=b"$x\n'")
        assert done == (5, "it's !x $HOME\n{}a'b\n!c$x\n'\n", "no\n")
        assert await ours.run(["true"]) == (0, "", "")
    finally:
        noise.unlink()
        sshd.banner.write_bytes(b"")
        await ours.close()


async def test_the_message_of_a_shell_that_refuses_logins_is_quoted(shell: Shell, sshd: Sshd) -> None:
    noise = sshd.home / ".bashrc"
    noise.write_text("echo This account is closed.; exit 1\n")
    try:
        with pytest.raises(CEUnavailableError, match=r"not the output of a shell .*: This account is closed\."):
            await shell().run(["true"])
    finally:
        noise.unlink()


async def test_binary_output_is_accepted(shell: Shell) -> None:
    assert (await shell().run(["printf", r"\377x"])).stdout == "\ufffdx"


async def test_missing_and_killed_commands_have_their_exit_code(shell: Shell) -> None:
    missing = await shell().run(["sbitch"])
    assert missing.returncode == 127
    assert "sbitch" in missing.stderr
    assert (await shell().run(["/bin/sh", "-c", "kill -9 $$"])).returncode != 0


async def test_a_command_need_not_read_its_input(shell: Shell) -> None:
    assert (await shell().run(["echo", "done"], stdin=b"x" * 5_000_000)).stdout == "done\n"


async def test_more_commands_than_the_server_has_sessions_wait_for_each_other(shell: Shell, sshd: Sshd) -> None:
    ours = shell(max_sessions=15)  # it has 10
    logged_in = sshd.logins()
    responses = await asyncio.gather(*(ours.run(["echo", str(number)]) for number in range(40)))
    assert [int(response.stdout) for response in responses] == list(range(40))
    assert sshd.logins() == logged_in + 1


async def test_a_host_with_an_unknown_key_is_refused_with_a_working_remedy(
    shell: Shell, sshd: Sshd, tmp_path: Path
) -> None:
    path = tmp_path / "new"
    for content in (None, "", "# nobody\nanother.example " + sshd.host_key() + "\n"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(
            NothingDoneError, match=r"has the host key SHA256:\S+, and .*new knows none: "
        ) as refusal:
            await shell(known_hosts=str(path)).run(["true"])
    advice = re.search(r"add it: (ssh-keyscan .*)$", str(refusal.value))
    assert advice is not None
    subprocess.run(advice[1], shell=True, check=True, capture_output=True)
    assert (await shell(known_hosts=str(path)).run(["echo", "in"])).stdout == "in\n"


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
async def test_a_host_whose_key_has_changed_is_refused_and_runs_nothing(
    shell: Shell, sshd: Sshd, tmp_path: Path, kind: str
) -> None:
    refusal = pytest.raises(
        NothingDoneError, match=rf"127\.0\.0\.1:{sshd.port} .*{sshd.known_hosts}.*ssh-keygen -R"
    )
    with sshd.another_host_key(kind=kind), refusal:
        await shell().run(["touch", f"{tmp_path}/owned"])
    assert not (tmp_path / "owned").exists()
    assert (await shell().run(["true"])).returncode == 0


async def test_a_revoked_host_key_is_refused(shell: Shell, sshd: Sshd, forgetful: Path) -> None:
    forgetful.write_text(f"{forgetful.read_text()}@revoked * {sshd.host_key()}\n")
    with pytest.raises(NothingDoneError, match="revoked"):
        await shell(known_hosts=str(forgetful)).run(["true"])


async def test_without_readable_known_hosts_no_host_is_trusted(
    shell: Shell, tmp_path: Path, forgetful: Path
) -> None:
    known, invalid = (
        forgetful.read_bytes(),
        b"|9|x|y ssh-rsa AAAA\n\xff\xfe\nword\n<<<<<<< HEAD\n@what * ssh-rsa AAAA\n",
    )
    forgetful.write_bytes(invalid)
    for path, message in ((forgetful, f"{forgetful} knows none"), (tmp_path, f"known hosts in {tmp_path}")):
        with pytest.raises(NothingDoneError, match=message):
            await shell(known_hosts=str(path)).run(["true"])
    forgetful.write_bytes(invalid + known)  # invalid lines do not hide the others
    assert (await shell(known_hosts=str(forgetful)).run(["true"])).returncode == 0


async def test_hashed_names_in_known_hosts_are_supported(shell: Shell, forgetful: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(forgetful)], check=True, capture_output=True)
    assert "127.0.0.1" not in forgetful.read_text()
    assert (await shell(known_hosts=str(forgetful)).run(["true"])).returncode == 0


async def test_a_key_that_is_not_authorized_is_named(shell: Shell, sshd: Sshd, tmp_path: Path) -> None:
    key = sshd.make_key(tmp_path / "stranger")
    with pytest.raises(
        NothingDoneError, match=f"refuses {sshd.user} with the keys tried .*stranger.*authorized_keys"
    ):
        await shell(client_keys=[str(key)]).run(["true"])


async def test_a_key_that_cannot_be_used_is_named(shell: Shell, sshd: Sshd, tmp_path: Path) -> None:
    locked = sshd.make_key(tmp_path / "locked", passphrase="open sesame")
    with pytest.raises(NothingDoneError, match=r"locked.*agent"):
        await shell(client_keys=[str(locked)]).run(["true"])
    with pytest.raises(NothingDoneError, match="absent"):
        await shell(client_keys=[str(tmp_path / "absent")]).run(["true"])
    (tmp_path / "garbage").write_text("no key")
    with pytest.raises(NothingDoneError, match="garbage"):
        await shell(client_keys=[str(tmp_path / "garbage")]).run(["true"])


@pytest.fixture
def agent(sshd: Sshd, tmp_path: Path) -> Iterator[Path]:
    """The socket of an agent that holds the client key."""
    path = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        add = ["ssh-add", "-q", str(sshd.client_key)]
        env = os.environ | {"SSH_AUTH_SOCK": str(path)}
        # Its socket is there before it listens.
        eventually(lambda: subprocess.run(add, check=False, env=env).returncode == 0, "the agent listens", 30)
        yield path
    finally:
        process.terminate()
        process.wait(20)


async def test_an_agent_can_hold_the_key(shell: Shell, agent: Path, monkeypatch: Any) -> None:
    assert (await shell(client_keys=[], agent_socket=str(agent)).run(["true"])).returncode == 0
    monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
    assert (await shell(client_keys=[]).run(["true"])).returncode == 0


async def test_with_key_files_the_agent_is_not_used(shell: Shell, sshd: Sshd, agent: Path, tmp_path: Path) -> None:
    stranger = str(sshd.make_key(tmp_path / "stranger"))
    os.environ["SSH_AUTH_SOCK"] = str(agent)
    try:
        with pytest.raises(NothingDoneError, match="refuses"):
            await shell(client_keys=[stranger]).run(["true"])
    finally:
        del os.environ["SSH_AUTH_SOCK"]


async def test_a_host_is_reached_through_jump_hosts_with_verified_keys(
    sshd: Sshd, jump_sshd: Sshd, tmp_path: Path
) -> None:
    through = jump_sshd.settings | {"jump": jump_sshd.settings}  # a chain: twice through the same one
    before = (sshd.logins(), jump_sshd.logins())
    ours = SSHShell(SSHHost(**sshd.settings, jump=through))
    responses = await asyncio.gather(*(ours.run(["echo", str(number)]) for number in range(3)))
    assert [response.stdout for response in responses] == ["0\n", "1\n", "2\n"]
    assert (sshd.logins(), jump_sshd.logins()) == (before[0] + 1, before[1] + 2)
    jump_sshd.cut()
    deadline = time.monotonic() + 30
    while True:  # what was under way is lost, and the next command makes the whole way anew
        try:
            assert (await ours.run(["echo", "again"])).stdout == "again\n"
            break
        except CEUnavailableError:
            assert time.monotonic() < deadline
    await ours.close()
    stranger = jump_sshd.settings | {"known_hosts": str(tmp_path / "none")}
    untrusted = SSHShell(SSHHost(**sshd.settings, jump=stranger))
    with pytest.raises(NothingDoneError, match=rf"127\.0\.0\.1:{jump_sshd.port} has the host key .* knows none"):
        await untrusted.run(["true"])
    await untrusted.close()


async def test_a_configured_file_of_openssh_is_read(sshd: Sshd, jump_sshd: Sshd, tmp_path: Path) -> None:
    entries = []
    for name, server, more in (("site", sshd, "ProxyJump gate"), ("gate", jump_sshd, "")):
        (key,) = server.settings["client_keys"]
        entries.append(
            f"Host {name}\nHostName 127.0.0.1\nPort {server.port}\nUser {server.settings['username']}\n"
            f"IdentityFile {key}\nUserKnownHostsFile {server.settings['known_hosts']}\n{more}\n"
        )
    config = tmp_path / "config"
    config.write_text("\n".join(entries))
    before = (sshd.logins(), jump_sshd.logins())
    ours = SSHShell(SSHHost(host="site", ssh_config=config, known_hosts=sshd.settings["known_hosts"]))
    assert (await ours.run(["echo", "there"])).stdout == "there\n"
    await ours.close()
    assert (sshd.logins(), jump_sshd.logins()) == (before[0] + 1, before[1] + 1)
    # The keys of both are verified as always.
    (tmp_path / "none").touch()
    stranger = SSHShell(SSHHost(host="site", ssh_config=config, known_hosts=tmp_path / "none"))
    with pytest.raises(NothingDoneError, match="knows none"):
        await stranger.run(["true"])
    await stranger.close()
    config.write_text(config.read_text().replace(str(jump_sshd.settings["known_hosts"]), str(tmp_path / "none")))
    stranger = SSHShell(SSHHost(host="site", ssh_config=config, known_hosts=sshd.settings["known_hosts"]))
    with pytest.raises(NothingDoneError, match=f"or a host on the way to it, with {config}"):
        await stranger.run(["true"])
    await stranger.close()
    assert sshd.logins() == before[0] + 1


async def test_an_unavailable_host_is_an_error_after_the_time_out(shell: Shell, sshd: Sshd) -> None:
    with sshd.down(), pytest.raises(NothingDoneError, match=f"no SSH connection to 127.0.0.1:{sshd.port}"):
        await shell().run(["true"])
    begin = time.monotonic()
    with sshd.frozen(), pytest.raises(NothingDoneError, match="no log-in within 1 s"):
        await shell(connect_timeout_seconds=1).run(["true"])
    assert time.monotonic() - begin < 20


async def test_a_host_without_ssh_is_an_error(shell: Shell) -> None:
    async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(os.urandom(100_000))
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(NothingDoneError, match=f"no SSH connection to 127.0.0.1:{port}: ."):
            await shell(port=port).run(["true"])


async def test_a_command_is_abandoned_after_the_time_out_and_the_connection_stays_usable(
    shell: Shell, sshd: Sshd
) -> None:
    ours = shell(command_timeout_seconds=0.3)
    await ours.run(["true"], timeout=20)
    logged_in = sshd.logins()
    begin = time.monotonic()
    with pytest.raises(CEUnavailableError, match=r"no response from sleep within 0\.3 s"):
        await ours.run(["sleep", "60"])
    assert time.monotonic() - begin < 20
    assert (await ours.run(["echo", "on"], timeout=20)).stdout == "on\n"
    assert sshd.logins() == logged_in


async def test_a_lost_connection_is_an_error_and_the_next_command_makes_a_new_one(
    shell: Shell, sshd: Sshd
) -> None:
    ours = shell()
    await ours.run(["true"])
    hanging = asyncio.ensure_future(ours.run(["sleep", "60"]))
    await asyncio.sleep(0)
    sshd.cut()
    with pytest.raises(CEUnavailableError, match=f"127.0.0.1:{sshd.port}: .") as lost:
        await hanging
    assert not isinstance(lost.value, NothingDoneError), "the command may have been run"
    assert (await ours.run(["echo", "again"])).stdout == "again\n"


async def test_an_endless_response_is_refused(sshd: Sshd) -> None:
    shell = SSHShell(SSHHost(**sshd.settings), max_bytes=1_000_000)
    with pytest.raises(CEUnavailableError, match="more than 1000000 bytes"):
        await shell.run(["cat", "/dev/zero"])
    await shell.close()


async def test_closing_does_not_wait_for_a_host_that_hangs(shell: Shell, sshd: Sshd) -> None:
    ours = shell()
    await ours.run(["true"])
    with sshd.frozen():
        begin = time.monotonic()
        await ours.close()
        assert time.monotonic() - begin < 20


async def test_without_the_extra_the_error_says_how_to_get_it(shell: Shell, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(NothingDoneError, match=r"pip install 'gubbins-pilots\[ssh\]'"):
        await shell().run(["true"])
