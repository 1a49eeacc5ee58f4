"""Errors of the data room. Each carries one message string alone, so it survives pickling."""

from __future__ import annotations


class BadSampleError(Exception):
    """One sample cannot be used; it empties its slot and is counted. Never leaves the data room."""

    def __init__(self, cause: str, detail: str = "", *, fatal: bool = False) -> None:
        """Describe the sample's fault.

        Args:
            cause: short, fixed name of the fault, by which skips are counted ("corrupt image").
            detail: what exactly was found.
            fatal: the fault is not the sample's own (its shard is gone): the run must stop, on every rank.
        """
        super().__init__(cause, detail)
        self.cause, self.detail, self.fatal = cause, detail, fatal


class MissingShardError(FileNotFoundError):
    """A shard that was asked for does not exist."""


class BadDataError(RuntimeError):
    """The run cannot go on with its data: too many bad samples, or a shard that vanished."""


class ResumeError(ValueError):
    """A saved position cannot be continued with this configuration or these shards."""


class NotOpenError(RuntimeError):
    """A reader was asked for a batch before it opened its data sets: it was restarted in between."""
