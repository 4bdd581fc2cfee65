"""Errors of the pilot system; each message names the object and a remedy."""

from __future__ import annotations

from shlex import quote

#: Limit of names in messages, which is the longest valid name.
_NAME = 128


class GubbinsError(Exception):
    """Base of errors that users can resolve.

    `public` is the message without details for administrators: messages of the site, and settings.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class PilotSubmissionError(GubbinsError):
    """A pilot was not submitted. Base of an error for each reason."""


class UnknownCEError(PilotSubmissionError):
    """There is no compute element of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"unknown compute element {name[:_NAME]!r}: `gubbins ce list` shows those that exist")


class DowntimeError(GubbinsError):
    """A downtime is invalid, or downtimes cannot be imported."""


class DowntimeNotFoundError(GubbinsError):
    """There is no downtime of that id."""

    def __init__(self, downtime_id: int) -> None:
        super().__init__(f"there is no downtime {downtime_id}: `gubbins ce downtime list` shows those that exist")


class CEDisabledError(PilotSubmissionError):
    """The compute element is disabled for new pilots."""

    def __init__(self, name: str) -> None:
        super().__init__(f"compute element {name!r} is disabled: `gubbins ce enable {quote(name)}` opens it again")


class CEPausedError(PilotSubmissionError):
    """The compute element is paused: downtime, invalid rules, quota or failed calls.

    Args:
        name: the compute element.
        reason: cause of the pause.
        site_error: error of the site, or of the rules; for administrators.
        remedy: command that ends the pause; for administrators; empty: enable the compute element.
    """

    def __init__(self, name: str, reason: str, site_error: str = "", remedy: str = "") -> None:
        paused = f"compute element {name!r} is paused: {reason}"
        show, enable = f"`gubbins ce show {quote(name)}`", f"`gubbins ce enable {quote(name)}`"
        super().__init__(
            f"{paused}{f' ({site_error})' if site_error else ''}; {show} shows until when, "
            f"{remedy or f'{enable} ends the pause'}",
            paused,
        )


class VONotServedError(PilotSubmissionError):
    """The compute element does not serve the VO."""

    def __init__(self, name: str, vo: str) -> None:
        super().__init__(f"compute element {name!r} does not serve VO {vo[:_NAME]!r}")


class NoRoomError(PilotSubmissionError):
    """All slots of the compute element are taken by SUBMITTED or RUNNING pilots, or requested."""

    def __init__(self, name: str, capacity: int, requested: int = 0) -> None:
        requests = f", {requested} of them by requests of other VOs" if requested else ""
        super().__init__(f"no room at compute element {name!r}: all {capacity} slots are taken{requests}")


class SubmissionLimitError(PilotSubmissionError):
    """A rule of the compute element refuses a further pilot of the VO.

    Args:
        name: the compute element.
        vo: VO of the pilot.
        rule: name of the rule, as `max_waiting`.
        limit: its value for the VO.
        why: present number of pilots, in words.
        retry_after_seconds: time after which the rule allows another one; None: depends on other pilots.
    """

    def __init__(
        self, name: str, vo: str, rule: str, limit: float, why: str, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(
            f"no pilot of VO {vo!r} at compute element {name!r}: its rule {rule} is {limit:g}, and {why}"
        )
        self.retry_after_seconds = retry_after_seconds


class CEQuotaError(PilotSubmissionError):
    """The site refuses more of our pilots for its quota.

    Args:
        name: the compute element.
        quota: number of our pilots there.
        site_error: message of the site, for administrators.
    """

    def __init__(self, name: str, quota: int, site_error: str) -> None:
        full = f"no room at compute element {name!r}: quota of the site: {quota}"
        super().__init__(f"{full} ({site_error})", full)


class CERefusedError(PilotSubmissionError):
    """The compute element refused the pilot, or did not respond (`responded` is false)."""

    def __init__(self, name: str, reason: str, *, public: str | None = None, responded: bool = True) -> None:
        what = "refused the pilot" if responded else "did not confirm the pilot"
        refused = f"compute element {name!r} {what}: "
        super().__init__(refused + reason, refused + (reason if public is None else public))


class CEExistsError(GubbinsError):
    """A compute element of that name exists already."""

    def __init__(self, name: str) -> None:
        super().__init__(f"compute element {name!r} exists already: `gubbins ce load` updates it from a file")


class CESettingsError(GubbinsError, ValueError):
    """A back end is not installed, or its settings are invalid.

    `problems` has a pair (path below the compute element, message) for each error.
    """

    separator = "; "

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        lines = (f"{path}: {message}" if path else message for path, message in problems)
        super().__init__(self.separator.join(lines))
        self.problems = problems


class CEFileError(CESettingsError):
    """The file of compute elements is invalid; one line per error."""

    separator = "\n"


class DiracConfigurationError(GubbinsError):
    """A configuration of DIRAC cannot be parsed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this is not a configuration of DIRAC: {reason}")


class CEUnavailableError(GubbinsError):
    """A compute element did not respond, or its response is invalid. The state of its pilots is not known.

    `requested_pause_seconds` is the pause that the site requests; 0: none.
    """

    requested_pause_seconds: float = 0


class SiteBusyError(GubbinsError):
    """Too many synchronous calls to compute elements.

    Args:
        counted_by: `user`, `compute element` or `process`.
        limit: the limit in words, as `4 at once`.
        retry_after_seconds: time after which a call may be possible.
    """

    def __init__(self, counted_by: str, limit: str, retry_after_seconds: int) -> None:
        super().__init__(
            f"too many calls to compute elements: the limit is {limit} for one {counted_by}, "
            f"try again in {retry_after_seconds} s"
        )
        self.retry_after_seconds = retry_after_seconds


class OutputUnavailableError(GubbinsError):
    """There is no output of a pilot."""

    def __init__(self, stamp: str, reason: str) -> None:
        super().__init__(f"no output of pilot {stamp}: {reason}")
        self.reason = reason


class PilotNotFoundError(GubbinsError):
    """There is no pilot of that id (of this VO, if given)."""

    def __init__(self, pilot_id: int) -> None:
        super().__init__(f"unknown pilot {pilot_id}: `gubbins pilots list` shows those that exist")


class RegistryUnavailableError(GubbinsError):
    """DiracX's pilot registry is not configured, or does not respond."""


class IllegalTransitionError(GubbinsError):
    """A transition other than SUBMITTED → RUNNING → DONE or FAILED was requested. Nothing was changed."""

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

    Unless the credentials were valid (`proven`), the public message discloses neither the reason nor the pilot.
    """

    def __init__(self, reason: str, *, proven: bool = True) -> None:
        super().__init__(reason, None if proven else "not the secret or the token of an active pilot")


class IdentityMisusedError(IdentityRefusedError):
    """A secret or a refresh token was used again."""

    def __init__(self, reason: str, vo: str, pilot_id: int) -> None:
        super().__init__(reason)
        self.vo = vo
        self.pilot_id = pilot_id


class TooManyReportsError(GubbinsError):
    """Too many requests of one pilot or from one address (`counted_by`)."""

    def __init__(self, counted_by: str, per_minute: int, retry_after_seconds: int) -> None:
        super().__init__(f"more than {per_minute} requests of one {counted_by} in a minute")
        self.retry_after_seconds = retry_after_seconds
