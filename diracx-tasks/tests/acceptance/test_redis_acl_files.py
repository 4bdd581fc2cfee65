"""The ACL files permit the commands of each role's scripts, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry
from support.redis_acl import FILES, LUA, ROLES, Server, allowed, commands_in, rules, scripts_of


def test_every_script_has_a_role_with_permission_for_its_commands() -> None:
    names = {file.name[:-4] for file in LUA.iterdir() if not file.name.startswith("_")}
    assert set().union(*map(scripts_of, ROLES)) == names
    for role in ROLES:
        missing = {command for name in scripts_of(role) for command in commands_in(name)} - allowed(role)
        assert not missing, f"{role}.acl lacks {sorted(missing)}"


def test_no_role_has_administrative_permissions() -> None:
    for role in ROLES:
        found = rules(role)
        assert {"resetkeys", "resetchannels", "-@all"} <= set(found)
        assert not {"~*", "allkeys", "&*", "allchannels", "+@all", "nopass"} & set(found)
        assert not [rule for rule in found if rule.startswith("+@")], "categories grow with the server's version"
        assert not allowed(role) & {
            *("keys", "scan", "flushall", "flushdb", "config", "acl", "script", "function", "debug", "monitor"),
            *("shutdown", "save", "replicaof", "migrate", "restore", "swapdb", "module", "client|kill", "rename"),
        }


def test_an_acl_file_without_a_password_is_not_loaded_and_anonymous_access_is_refused(
    acl_server: Server, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=r"(?i)NOAUTH|authenticat"):
        Redis(port=acl_server.process.port, retry=Retry(NoBackoff(), 0)).ping()
    (tmp_path / "users.acl").write_text((FILES / "worker.acl").read_text())
    with pytest.raises(Exception, match=r"(?i)password hash|error"):
        acl_server.admin.acl_load()


# --- what each role is refused ----------------------------------------------------------------------------------

#: Role -> commands that are another role's, or an administrator's.
REFUSED = {
    "submitter": [
        "XRANGE diracx:tasks:normal:medium - +",  # what others have submitted
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "XDEL diracx:tasks:normal:medium 1-1",
        "DEL diracx:tasks:normal:medium",
        "SET diracx:results:x forged",
        "DEL lock:mutex:job:42",
        "GET lock:mutex:job:42",
        "SET diracx:scheduler:leader me",
        "HSET diracx:scheduler:paused all 1",
        "XADD diracx:tasks:audit * data forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "ZADD diracx:tasks:cancelled 1 x",
        "ZADD diracx:tasks:alive 1 x",
        "HGETALL diracx:tasks:config-in-force",
        "PUBLISH diracx:tasks:cancelled x",
        "SUBSCRIBE diracx:tasks:cancelled",
        "GET another:application",
    ],
    "worker": [
        "XADD diracx:tasks:audit * data forged",
        "XRANGE diracx:tasks:audit - +",
        "SET diracx:scheduler:leader me",
        "ZADD diracx:scheduler:next 1 x",
        "HSET diracx:scheduler:paused all 1",
        "SET diracx:tasks:resubmitted:x 1",
        "PUBLISH diracx:scheduler:leader free",
        "SET another:application 1",
    ],
    "scheduler": [
        "GET diracx:results:x",
        "GET lock:mutex:job:42",
        "DEL lock:mutex:job:42",
        "ZADD diracx:tasks:alive 1 x",
        "ZADD diracx:tasks:cancelled 1 x",
        "XADD diracx:tasks:audit * data forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "SET another:application 1",
    ],
    "dashboard": [
        "SET diracx:scheduler:leader me",
        "ZADD diracx:scheduler:next 1 x",
        "ZADD diracx:tasks:alive 1 x",
        "HSET diracx:monitor:worker:x line forged",
        "HSET diracx:tasks:config-in-force x forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "PUBLISH diracx:scheduler:leader free",
        "GET another:application",
    ],
}


ADMINISTRATORS = [
    *(
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "SCAN 0",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "ACL LIST",
        "ACL WHOAMI",
    ),
    *(
        "MONITOR",
        "SHUTDOWN",
        "SAVE",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "FUNCTION LIST",
        "SWAPDB 0 1",
    ),
    *("CLIENT KILL TYPE normal", "CLIENT LIST", "REPLICAOF NO ONE", "RENAME a b", "MIGRATE h 1 k 0 1"),
]


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_refused_commands_of_others_even_in_scripts(acl_server: Server, role: str) -> None:
    done = []
    for line in (*REFUSED[role], *ADMINISTRATORS):
        words = line.split()
        # A script declares no keys here, and has no more rights than its sender.
        as_script = ("EVAL", f"return redis.call({', '.join(map(repr, words))})", 0)
        for command in (words, as_script):
            with acl_server.client(role) as client:
                try:
                    client.execute_command(*command)
                except ResponseError as error:
                    if re.search(
                        r"(?i)permission|can't (run|access)|not allowed from script|unknown command", str(error)
                    ):
                        continue
                    done.append(f"{line}: {error}")
                else:
                    done.append(line)
    assert not done


@pytest.mark.parametrize("category", ["admin", "dangerous"])
def test_no_role_needs_the_commands_that_managed_servers_keep_to_themselves(
    acl_server: Server, category: str
) -> None:
    kept = {command.lower().replace("|", " ") for command in acl_server.admin.acl_cat(category)}
    for role in ROLES:
        assert {command.replace("|", " ") for command in allowed(role)} & kept <= {"info"}
