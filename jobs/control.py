"""The actor between a run's training processes and its driver: records out, stop requests in."""

from typing import Any


class Control:
    """Holds what the driver shows and what the training processes ask for. One per run, without logic."""

    def __init__(self) -> None:
        """Start empty."""
        self._records: list[dict[str, Any]] = []
        self._stop = False
        self._begun: dict[int, int] = {}
        self._outcome: Any = None
        self._error: Exception | None = None

    def begin(self, rank: int) -> int:
        """Note that a training process begins; return how many times this rank began before."""
        times = self._begun.get(rank, 0)
        self._begun[rank] = times + 1
        return times

    def show(self, record: dict[str, Any]) -> None:
        """Take a metrics record for the driver's console."""
        self._records.append(record)

    def drain(self) -> list[dict[str, Any]]:
        """Return the records since the last call."""
        records, self._records = self._records, []
        return records

    def request_stop(self) -> None:
        """Ask the training processes to save a checkpoint and end."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether a stop was requested."""
        return self._stop

    def finish(self, outcome: Any) -> None:
        """Take the first rank's outcome."""
        self._outcome = outcome

    def fail(self, error: Exception) -> None:
        """Take an error that would come again; the first one told is kept."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """Return the error that ends the run, if any: training processes that begin after it do nothing."""
        return self._error

    def outcome(self) -> Any:
        """Return the first rank's outcome, None while it runs."""
        return self._outcome
