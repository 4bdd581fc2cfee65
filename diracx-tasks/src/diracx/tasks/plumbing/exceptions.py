"""Exceptions of tasks. Messages name the object, the value and the remedy."""

from __future__ import annotations


class UnableToAcquireLockError(Exception):
    """A lock of the task is held by another owner."""


class LockLostError(Exception):
    """A lock or the lease of a running task could not be renewed, and may have another owner.

    Raised inside the execution, which is cancelled; the retry policy decides whether it is retried.
    """


class TimeLimitExceededError(Exception):
    """The execution exceeded its `time_limit_seconds` and was cancelled."""


class TaskCancelledError(Exception):
    """The task was cancelled by a user. It is not retried, not a dead letter, and for its group it has failed.

    Its execution gets a `CancelledError` at its next `await`.
    """


class WorkerStoppedError(Exception):
    """The worker was stopped, and its grace period ended before the task."""


class TaskRejectedError(Exception):
    """The task could not be executed and became a dead letter; the message has the reason."""


class NewerMessageError(ValueError):
    """A message has the format of a newer version of this software."""


class StopRetryingError(Exception):
    """Raise it (or a subclass) in a task to fail without further retries."""


class TooManyRetriesError(StopRetryingError):
    """The retries of a task are used up."""


class UnretryableError(StopRetryingError):
    """The failure is permanent."""


class TaskRetryRequestedError(Exception):
    """Raise it in a task to retry it, independently of its retry policy."""


class SendTaskError(Exception):
    """A task could not be submitted."""


class DuplicateTaskIdError(SendTaskError):
    """The id of a task is used by another one."""


class TaskTooLargeError(SendTaskError):
    """The message of a task is too large: pass a reference to its data instead."""


class ResultTooLargeError(Exception):
    """The return value of a task is too large to be stored. The task has succeeded."""


class ResultIsMissingError(Exception):
    """The result was not stored, or has expired."""


class TaskArgumentsError(ValueError):
    """The task class does not accept the arguments."""


class TaskConfigError(ValueError):
    """The configuration of tasks is wrong; the message has one line per problem."""
