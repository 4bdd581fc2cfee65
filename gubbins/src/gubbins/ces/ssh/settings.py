"""Settings of the back end `ssh`."""

from __future__ import annotations

from pydantic import Field

from gubbins.ces.settings import DefaultScript, KeepDays, PilotSettings, StartSeconds, Text
from gubbins.ces.transports.ssh import SSHHost


class SSHSettings(SSHHost, PilotSettings):
    """Settings of a compute element that is a Linux host."""

    workdir: Text = Field(
        default="",
        description="Directory of the pilots' directories, relative to the home directory; "
        "default .local/state/gubbins/<CE name>.",
    )
    default_script: DefaultScript = None
    kill_after_seconds: int = Field(
        default=10, ge=0, description="Time from SIGTERM to SIGKILL for a cancelled pilot."
    )
    keep_days: KeepDays = 7
    start_seconds: StartSeconds = 60
    pilots_per_command: int = Field(default=200, ge=1, description="Pilots in one remote command.")
