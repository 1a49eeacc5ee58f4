"""Which errors are told to a person as one message, and which are ours to fix and keep their traceback."""

from data_pipeline.errors import BadDataError, ResumeError
from flamingo_dist.training.checkpoint_folder import CheckpointError
from flamingo_dist.training.step import TrainingDivergedError

ERRORS_OF_ALL_RANKS: tuple[type[Exception], ...] = (
    CheckpointError,
    BadDataError,
    ResumeError,
    TrainingDivergedError,
)
"""Errors that every rank raises at the same place, so that none is left waiting for the others."""
USER_ERRORS: tuple[type[Exception], ...] = (*ERRORS_OF_ALL_RANKS, ValueError, FileNotFoundError)
"""Errors whose message says what was given, what is allowed and what to do."""


class RunFailedError(RuntimeError):
    """A training process failed; the message says why."""


def is_for_users(error: BaseException) -> bool:
    """Return whether `error`'s message is all that a person needs.

    An `OSError` is: a server that does not answer, a full disk, a file in the place of a folder.
    """
    return isinstance(error, (*USER_ERRORS, RunFailedError, OSError))
