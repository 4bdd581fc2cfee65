"""Exceptions of tasks. Every message names the thing, the value and the remedy."""

from __future__ import annotations


class UnableToAcquireLockError(Exception):
    """A lock of the task is held by another owner."""


class LockLostError(Exception):
    """A lock or the lease of a running task could not be renewed: another owner may hold it now.

    Raised inside the execution, which is cancelled; the task's retry policy decides what follows.
    """


class TimeLimitExceededError(Exception):
    """The execution ran for longer than its `time_limit_seconds` and was cancelled."""


class TaskCancelledError(Exception):
    """The task was cancelled by a user. It is not retried, it is no dead letter, and for its group it has failed.

    Its execution is cancelled as any asyncio task is, by a `CancelledError` at its next `await`.
    """


class WorkerStoppedError(Exception):
    """The worker was stopped and its grace period ended before the task did."""


class TaskRejectedError(Exception):
    """The task could not be executed at all and was put with the dead letters: the result says why."""


class NewerMessageError(ValueError):
    """A message has a format that only a later version of this software knows."""


class StopRetryingError(Exception):
    """Raise it (or a subclass) in a task to end its retries at once."""


class TooManyRetriesError(StopRetryingError):
    """The retries of a task are used up."""


class UnretryableError(StopRetryingError):
    """The failure is of a kind that no retry can mend."""


class TaskRetryRequestedError(Exception):
    """Raise it in a task to be run again, whatever the retry policy makes of other exceptions."""


class SendTaskError(Exception):
    """A task could not be handed to the broker."""


class DuplicateTaskIdError(SendTaskError):
    """A task was given an id that belongs to another one."""


class TaskTooLargeError(SendTaskError):
    """The message of a task is larger than may be submitted: pass where its data are instead."""


class ResultTooLargeError(Exception):
    """The return value of a task is too large to be kept: its result says so. The task itself has succeeded."""


class ResultIsMissingError(Exception):
    """The result was never kept, or its time to live has passed."""


class TaskArgumentsError(ValueError):
    """The arguments do not fit the task class."""


class TaskConfigError(ValueError):
    """The operator's configuration of tasks is wrong; the message has one line per problem."""
