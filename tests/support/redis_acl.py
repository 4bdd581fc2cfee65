"""ACL files of deploy/redis/acl: parser, and a server that has loaded them."""

from __future__ import annotations

__all__ = [
    "FILES",
    "LUA",
    "PAGE",
    "PASSWORD",
    "ROLES",
    "Server",
    "allowed",
    "commands_in",
    "named",
    "rules",
    "scripts_of",
]

import re
from dataclasses import dataclass
from importlib.resources import files

from diracx.tasks.testing.server import ValkeyProcess
from redis import Redis

from support.paths import ROOT

FILES = ROOT / "deploy" / "redis" / "acl"


PAGE = ROOT / "docs" / "how-to" / "restrict-redis.md"


LUA = files("diracx.tasks.plumbing.broker") / "lua"


ROLES = ("submitter", "worker", "scheduler", "dashboard")


PASSWORD = "correct-horse"  # of all roles in these tests


# --- what is written: the files, the scripts, the page ----------------------------------------------------------


def rules(role: str) -> list[str]:
    """The rules of a role's user."""
    user, name, *found = (FILES / f"{role}.acl").read_text().split()
    assert (user, name) == ("user", f"diracx-{role}")
    return found


def allowed(role: str) -> set[str]:
    """The commands that a role may send."""
    return {rule.strip("()")[1:] for rule in rules(role) if rule.startswith("+")}


def scripts_of(role: str) -> set[str]:
    """The scripts of a role, as the page has them."""
    found = re.search(rf"^\| `{role}` \| [^|]* \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    assert found, f"{PAGE} has no row for {role}"
    return set(re.findall(r"`(\w+)`", found[1]))


def commands_in(name: str) -> set[str]:
    """The commands of a script and of its includes."""
    text = (LUA / f"{name}.lua").read_text()
    found = set()
    for command, word in re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"](?:\s*,\s*['\"](\w+)['\"])?", text):
        found.add(named([command, word]))
    for parts in re.findall(r"#include (.+)", text):
        found |= {command for part in parts.split() for command in commands_in(part)}
    return found


def named(words: list[str]) -> str:
    name = words[0].lower()
    return f"{name}|{words[1].lower()}" if name in ("client", "xinfo", "xgroup") else name


# --- a server with those users ----------------------------------------------------------------------------------


@dataclass
class Server:
    """A server that has loaded the files of `deploy/redis/acl`, and beside them a user for this test."""

    process: ValkeyProcess
    admin: Redis

    def url(self, role: str) -> str:
        """The URL of a role. Its connections are named after it."""
        port = self.process.port
        return f"redis://diracx-{role}:{PASSWORD}@127.0.0.1:{port}?client_name={role}"

    def client(self, role: str) -> Redis:
        return Redis.from_url(self.url(role))
