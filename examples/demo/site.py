"""Build a DiracX installation: configuration, keys, databases, environment."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .slurm import SlurmSite

VOS = ("cta", "juno", "lhcb")
USER = "demo"

#: Minutes become seconds here, by configuration alone: the code keeps the seed's schedules.
TASKS = {
    "common": {
        "my_pilots:MySubmitPilotsTask": {"periodic": {"interval_seconds": 2}},
        "my_pilots:MyCheckPilotsTask": {"periodic": {"interval_seconds": 1}},
        "my_pilots:MyCollectOutputsTask": {"periodic": {"interval_seconds": 2}},
        "my_pilots:MyPilotReportTask": {"periodic": {"interval_seconds": 10}},
        # This installation has no sandboxes.
        "jobs:CleanSandboxStoreTask": {"enabled": False},
    }
}

#: Services of DiracX itself that the demo does without.
_OTHER_SERVICES = ("AUTH", "CONFIG", "HEALTH", "JOBS", "RSS")


_BY_JOBS = {"policy": "waiting_jobs", "max_surplus_seconds": 30}


def compute_elements(directory: Path) -> list[dict[str, Any]]:
    """A reliable, a flaky and a local compute element."""
    return [
        {
            "name": "reliable.example.org",
            "capacity": 20,
            "success_rate": 1.0,
            "settings": {"run_seconds": 4},
            "rules": _BY_JOBS | {"site": "LCG.Reliable.org", "tags": ["GPU"]},
        },
        {
            "name": "flaky.example.org",
            "capacity": 10,
            "success_rate": 0.3,
            "settings": {"run_seconds": 3},
            "rules": _BY_JOBS | {"site": "LCG.Flaky.org"},
        },
        {
            "name": "localhost",
            "capacity": 4,
            "backend": "local",
            "settings": {
                "directory": str(directory),
                # Their pilots take a token of DiracX, report, and tell why they end.
                "payloads": {
                    "lhcb": "sleep 3; echo 1 > $PILOT_JOBS_FILE",
                    # One in three of these fails: a pilot's exit code decides.
                    "cta": "sleep 2; exit $(( $(date +%s) % 3 == 0 ))",
                    "juno": "sleep 1; exit 75",  # there is no work
                },
            },
            "rules": {"heartbeat_seconds": 2},
        },
    ]


def slurm_compute_elements(directory: Path, slurm: SlurmSite) -> list[dict[str, Any]]:
    """A Slurm site, whose node has as many CPUs as the compute element has slots."""
    return [
        {
            "name": "slurm",
            "capacity": slurm.cpus,
            "backend": "slurm",
            "settings": {
                "directory": str(directory),
                "slurm_conf": str(slurm.slurm_conf),
                "partition": "short",
                "wall_minutes": 5,
                "scripts": {
                    "lhcb": "sleep 30",
                    # One in three of these fails: a pilot's exit code decides.
                    "cta": "sleep 25; [ $(( $(date +%s) % 3 )) != 0 ] || { echo no luck today >&2; exit 1; }",
                },
                "default_script": "sleep 20",
                "keep": "none",
            },
        }
    ]


@dataclass(frozen=True)
class DemoSite:
    """A directory with everything in it. `build()` fills it; nothing of it is outside."""

    directory: Path
    redis_url: str
    api_port: int
    dashboard_port: int
    slurm: SlurmSite | None = None  # instead of the usual compute elements
    dashboard_token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def environment(self) -> dict[str, str]:
        """For every process of the installation."""
        return {
            "DIRACX_CONFIG_BACKEND_URL": f"git+file://{self.directory}/configuration",
            "DIRACX_DB_URL_MYPILOTDB": f"sqlite+aiosqlite:///{self.directory}/pilots.sqlite",
            "DIRACX_DB_URL_TASKDB": f"sqlite+aiosqlite:///{self.directory}/tasks.sqlite",
            "DIRACX_DB_URL_JOBDB": f"sqlite+aiosqlite:///{self.directory}/jobs.sqlite",
            "DIRACX_DB_URL_TASKQUEUEDB": f"sqlite+aiosqlite:///{self.directory}/task-queues.sqlite",
            "DIRACX_DB_URL_PILOTAGENTSDB": f"sqlite+aiosqlite:///{self.directory}/registry.sqlite",
            "GUBBINS_PILOT_API_URL": f"{self.api_url}/api/my_pilots",
            "DIRACX_SERVICE_AUTH_STATE_KEY": (self.directory / "state.key").read_text(),
            "DIRACX_SERVICE_AUTH_TOKEN_ISSUER": self.api_url,
            "DIRACX_SERVICE_AUTH_TOKEN_KEYSTORE": f"file://{self.directory}/keystore.json",
            "DIRACX_SERVICE_AUTH_ACCESS_TOKEN_EXPIRE_MINUTES": "1440",
            "DIRACX_TASKS_REDIS_URL": self.redis_url,
            **{f"DIRACX_SERVICE_{name}_ENABLED": "false" for name in _OTHER_SERVICES},
        }

    @property
    def ce_file(self) -> Path:
        return self.directory / "ces.yaml"

    def build(self) -> None:
        """Write the configuration repository, the keys and the compute elements.

        Raises:
            subprocess.CalledProcessError: git refused.
        """
        from cryptography.fernet import Fernet
        from joserfc.jwk import KeySet, OKPKey

        key = OKPKey.generate_key("Ed25519", {"key_ops": ["sign", "verify"], "alg": "Ed25519", "kid": "demo"})
        self._secret("keystore.json", json.dumps(KeySet([key]).as_dict(private=True)))
        self._secret("state.key", Fernet.generate_key().decode())
        pilots = self.directory / "pilots"
        ces = compute_elements(pilots) if self.slurm is None else slurm_compute_elements(pilots, self.slurm)
        self.ce_file.write_text(yaml.safe_dump({"compute_elements": ces}, sort_keys=False))
        self._commit_configuration(self.directory / "configuration")

    def _secret(self, name: str, text: str) -> None:
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(text)

    def _commit_configuration(self, repository: Path) -> None:
        repository.mkdir()
        document = {
            "DIRAC": {},
            "Operations": {},
            "Registry": {vo: _vo(vo) for vo in VOS},
            "Systems": {"Tasks": TASKS},
        }
        (repository / "default.yml").write_text(yaml.safe_dump(document, sort_keys=False))
        # Nothing of the user's own git configuration is needed, or asked.
        author = ("-c", "user.name=gubbins", "-c", "user.email=demo@localhost", "-c", "commit.gpgsign=false")
        for arguments in (
            ("init", "--initial-branch=master"),
            ("add", "."),
            ("commit", "--message=Demonstration"),
        ):
            subprocess.run(
                ["git", *author, *arguments], cwd=repository, check=True, capture_output=True, text=True
            )

    async def create_databases(self) -> None:
        """Create the tables, load the compute elements, and submit the first jobs."""
        from diracx.tasks.plumbing.persistence import TaskDB

        from gubbins.db.sql import MyPilotDB
        from gubbins.logic import my_pilots as logic

        from .jobs import fill

        task_db = TaskDB(self.environment["DIRACX_DB_URL_TASKDB"])
        async with task_db.engine_context(), task_db.engine.begin() as connection:
            await connection.run_sync(task_db.metadata.create_all)
        pilot_db = MyPilotDB(self.environment["DIRACX_DB_URL_MYPILOTDB"])
        async with pilot_db.engine_context():
            await pilot_db.create_tables()
            await logic.load_ces(pilot_db, logic.parse_ce_file(self.ce_file.read_text()))
        await fill()

    def token(self, vo: str, properties: tuple[str, ...] = ("NormalUser", "ServiceAdministrator")) -> str:
        """A token that the API of this site accepts for a day. Reads the environment of the site."""
        from datetime import UTC, datetime, timedelta

        from diracx.core.models import AccessTokenPayload
        from diracx.core.properties import SecurityProperty
        from diracx.core.settings import AuthSettings
        from diracx.logic.auth.token import create_token
        from uuid_utils import uuid7

        settings = AuthSettings()  # type: ignore[call-arg]  # they come from the environment
        payload = AccessTokenPayload(
            sub=f"{vo}:{USER}",
            vo=vo,
            iss=settings.token_issuer,
            dirac_properties=[SecurityProperty(name) for name in properties],
            jti=str(uuid7()),
            preferred_username=USER,
            dirac_group=f"{vo}_admin",
            exp=datetime.now(UTC) + timedelta(days=1),
            dirac_policies={},
        )
        return create_token(payload, settings)


def _vo(vo: str) -> Mapping[str, Any]:
    return {
        "DefaultGroup": f"{vo}_admin",
        "IdP": {"URL": "https://idp.invalid", "ClientID": "demo"},
        "Users": {USER: {"PreferedUsername": USER}},
        "Groups": {f"{vo}_admin": {"Properties": ["NormalUser", "ServiceAdministrator"], "Users": [USER]}},
    }
