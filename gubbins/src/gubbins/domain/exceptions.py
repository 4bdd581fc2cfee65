"""Errors of the pilot system; each message names the thing and the way out."""

from __future__ import annotations

#: Characters of a name that an error repeats: no name that exists is longer.
_NAME = 128


class GubbinsError(Exception):
    """Base of the errors that a user of the pilot system can do something about.

    `public` is the message without what only administrators may see: messages of the site, and settings.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class PilotSubmissionError(GubbinsError):
    """A pilot was not submitted, and holds no slot. The subclasses say why."""


class UnknownCEError(PilotSubmissionError):
    """There is no compute element of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown compute element {name[:_NAME]!r}: `gubbins ce list` shows those that exist")
        self.name = name


class DowntimeError(GubbinsError):
    """There can be no such downtime, or it cannot be imported."""


class DowntimeNotFoundError(GubbinsError):
    """There is no downtime of that id."""

    def __init__(self, downtime_id: int) -> None:
        super().__init__(f"there is no downtime {downtime_id}: `gubbins ce downtime list` shows those that exist")


class CEDisabledError(PilotSubmissionError):
    """The compute element exists and takes no new pilots."""

    def __init__(self, name: str) -> None:
        super().__init__(f"compute element {name!r} is disabled: `gubbins ce enable {name}` opens it again")


class CEPausedError(PilotSubmissionError):
    """The compute element is in downtime, or failed too often, and is paused.

    Args:
        name: the compute element.
        why: which downtime or failures.
        said: last error of the site, or the error in the rules: for administrators.
        way_out: what ends it: for administrators; none: it is opened.
    """

    def __init__(self, name: str, why: str, said: str = "", way_out: str = "") -> None:
        paused = f"compute element {name!r} is paused: {why}"
        super().__init__(
            f"{paused}{f' ({said})' if said else ''}; `gubbins ce show {name}` says until when, "
            f"{way_out or f'`gubbins ce enable {name}` ends the pause'}",
            paused,
        )


class VONotServedError(PilotSubmissionError):
    """The compute element lists the VOs it serves, and this one is not among them."""

    def __init__(self, name: str, vo: str) -> None:
        super().__init__(f"compute element {name!r} does not serve VO {vo[:_NAME]!r}")


class NoRoomError(PilotSubmissionError):
    """The compute element is full: all its slots are held by SUBMITTED or RUNNING pilots (P60)."""

    def __init__(self, name: str, capacity: int, promised: int = 0) -> None:
        promises = f", {promised} of them by pilots of other VOs that are on their way" if promised else ""
        super().__init__(f"no room at compute element {name!r}: all {capacity} slots are taken{promises}")


class SubmissionLimitError(PilotSubmissionError):
    """A rule of the compute element gives the VO no further pilot now.

    Args:
        name: the compute element.
        vo: whose pilot it would have been.
        rule: the rule's name, as `max_waiting`.
        limit: its value for the VO.
        why: how the VO stands.
        retry_after_seconds: when the rule may allow another one; None: that depends on other pilots.
    """

    def __init__(
        self, name: str, vo: str, rule: str, limit: float, why: str, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(
            f"no pilot of VO {vo!r} at compute element {name!r}: its rule {rule} is {limit:g}, and {why}"
        )
        self.rule = rule
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds


class CEQuotaError(PilotSubmissionError):
    """The site takes no more of our pilots now.

    Args:
        name: the compute element.
        quota: how many it has.
        said: the site's words: for administrators.
    """

    def __init__(self, name: str, quota: int, said: str) -> None:
        full = f"no room at compute element {name!r}: quota of the site: {quota}"
        super().__init__(f"{full} ({said})", full)


class CERefusedError(PilotSubmissionError):
    """The compute element itself refused the pilot, or has not answered (`answered` is false)."""

    def __init__(self, name: str, reason: str, *, public: str | None = None, answered: bool = True) -> None:
        what = "refused the pilot" if answered else "has not said whether it has the pilot"
        refused = f"compute element {name!r} {what}: "
        super().__init__(refused + reason, refused + (reason if public is None else public))


class CEExistsError(GubbinsError):
    """A compute element of that name exists already."""

    def __init__(self, name: str) -> None:
        super().__init__(f"compute element {name!r} exists already: `gubbins ce load` updates it from a file")


class CESettingsError(GubbinsError, ValueError):
    """A back end is not installed, or its settings are invalid.

    `problems` holds one (path below the compute element, message) pair per mistake.
    """

    separator = "; "

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        lines = (f"{path}: {message}" if path else message for path, message in problems)
        super().__init__(self.separator.join(lines))
        self.problems = problems


class CEFileError(CESettingsError):
    """The file of compute elements is invalid; one line per mistake."""

    separator = "\n"


class DiracConfigurationError(GubbinsError):
    """A configuration of DIRAC cannot be read."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this is no configuration of DIRAC: {reason}")


class CEUnavailableError(GubbinsError):
    """A compute element did not respond, or not validly. Nothing follows from that for any pilot."""


class SiteBusyError(GubbinsError):
    """Too many requests reach compute elements, so this one was refused.

    Args:
        whose: `user`, `compute element` or `process`.
        limit: as `4 at once`.
        retry_after_seconds: when it may be possible.
    """

    def __init__(self, whose: str, limit: str, retry_after_seconds: int) -> None:
        super().__init__(
            f"too many requests that reach a compute element: no more than {limit} for one {whose}, "
            f"try again in {retry_after_seconds} s"
        )
        self.retry_after_seconds = retry_after_seconds


class OutputUnavailableError(GubbinsError):
    """There is no output of a pilot."""

    def __init__(self, stamp: str, reason: str) -> None:
        super().__init__(f"no output of pilot {stamp}: {reason}")
        self.stamp = stamp
        self.reason = reason


class PilotNotFoundError(GubbinsError):
    """There is no pilot of that id (for this VO, where one was given)."""

    def __init__(self, pilot_id: int) -> None:
        super().__init__(f"unknown pilot {pilot_id}: `gubbins pilots list` shows those that exist")


class RegistryUnavailableError(GubbinsError):
    """DiracX's pilot registry is not configured, or does not answer."""


class IllegalTransitionError(GubbinsError):
    """A pilot was asked to leave the path SUBMITTED → RUNNING → DONE or FAILED. Nothing was changed."""

    def __init__(self, pilot_id: int, current: str, wanted: str) -> None:
        super().__init__(
            f"pilot {pilot_id} is {current} and cannot become {wanted}: "
            "pilots go from SUBMITTED to RUNNING, then to DONE or FAILED"
        )


class PilotEndedError(GubbinsError):
    """The pilot has ended already."""

    def __init__(self, pilot_id: int, status: str) -> None:
        super().__init__(f"pilot {pilot_id} has ended ({status}): there is nothing to cancel")


class IdentityRefusedError(GubbinsError):
    """A pilot gets no token, or its token is refused.

    Without `proven` (the secret or the token was the pilot's) nothing tells why, nor which pilots exist.
    """

    def __init__(self, reason: str, *, proven: bool = True) -> None:
        super().__init__(reason, None if proven else "not the secret or the token of an active pilot")


class IdentityMisusedError(IdentityRefusedError):
    """A secret or a refresh token that was used up was presented again."""

    def __init__(self, reason: str, vo: str, pilot_id: int) -> None:
        super().__init__(reason)
        self.vo = vo
        self.pilot_id = pilot_id


class TooManyReportsError(GubbinsError):
    """Too many requests of one pilot, or from one address.

    Args:
        whose: `pilot` or `address`.
        per_minute: the limit.
        retry_after_seconds: when it may be possible.
    """

    def __init__(self, whose: str, per_minute: int, retry_after_seconds: int) -> None:
        super().__init__(f"more than {per_minute} requests of one {whose} in a minute")
        self.retry_after_seconds = retry_after_seconds
