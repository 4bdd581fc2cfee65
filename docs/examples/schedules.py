"""The three kinds of schedules, and tasks for every VO."""

from dataclasses import dataclass

from diracx.tasks.plumbing import (
    CronSchedule,
    IntervalSeconds,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    RRuleSchedule,
)


class Heartbeat(PeriodicBaseTask):
    default_schedule = IntervalSeconds(30)

    async def execute(self) -> None: ...


class NightlyReport(PeriodicBaseTask):
    # Six in the morning where the readers are, in summer and in winter.
    default_schedule = CronSchedule("0 6 * * *", timezone="Europe/Zurich")

    async def execute(self) -> None: ...


class MonthEnd(PeriodicBaseTask):
    default_schedule = RRuleSchedule("FREQ=MONTHLY;BYDAY=-1FR;BYHOUR=18;BYMINUTE=0;BYSECOND=0")

    async def execute(self) -> None: ...


@dataclass
class Quota(PeriodicVoAwareBaseTask):
    """One instance for each VO; `self.vo` says which."""

    default_schedule = CronSchedule("*/15 * * * *")

    async def execute(self) -> str:
        return f"quota of {self.vo}"
