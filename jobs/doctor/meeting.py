"""Nodes meet: one listens on the master's port, the others call it, compare clocks and say who they are.

So one exchange shows that the port can be listened on, that every node reaches it through whatever firewall there is,
and how far the clocks are apart. It is NTP's: the caller notes when it asked and when it heard, the listener when it
got and when it answered; the offset is known to half of the time on the way.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.doctor.report import Clock

GREETING = "flamingo-doctor"
"""First word of every message: whatever else listens on the port would not say it."""
_ROUNDS = 5
_LINE = 4096


class NotTheDoctorError(OSError):
    """Something answered that is not the doctor."""


@dataclass
class Meeting:
    """A listener that answers until it is closed."""

    _listener: socket.socket
    _now: Callable[[], float]

    def __post_init__(self) -> None:
        """Start to answer."""
        self.callers: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._accept, name="doctor-meeting", daemon=True).start()

    @property
    def port(self) -> int:
        """Port that is listened on."""
        return int(self._listener.getsockname()[1])

    def wait_for(self, callers: int, seconds: float) -> set[str]:
        """Wait until so many nodes have called, or the time is over; return who has."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.callers) >= callers, timeout=seconds)
            return set(self.callers)

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """Answer one caller's questions until it hangs up; whoever does not greet is left alone.

        A caller counts once it has heard all that it asked for: who waits for callers may end right after it.
        """
        node = None
        with connection, connection.makefile("rw") as lines:
            connection.settimeout(10)
            try:
                while line := lines.readline(_LINE):
                    received = self._now()
                    question = json.loads(line)
                    if not isinstance(question, dict) or question.get("greeting") != GREETING:
                        return
                    answer = {"greeting": GREETING, "received": received, "sent": self._now()}
                    lines.write(json.dumps(answer) + "\n")
                    lines.flush()
                    node = str(question["node"])
            except (OSError, ValueError, KeyError):
                return
        if node is not None:
            with self._changed:
                self.callers.add(node)
                self._changed.notify_all()


def listen(address: str, port: int, *, now: Callable[[], float] = time.time) -> Meeting:
    """Listen on all of this host's addresses.

    Args:
        address: the master's address: tells whether it is IPv4 or IPv6.
        port: 0 takes any that is free.
        now: this node's clock.

    Raises:
        OSError: the port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return Meeting(socket.create_server(("", port), family=family), now)


def call(
    address: str, port: int, node: str, seconds: float, *, now: Callable[[], float] = time.time
) -> Clock:
    """Call the listener, again and again while it may not have started, and return this clock against its.

    Args:
        address: the master's address.
        port: its port.
        node: who calls.
        seconds: how long to try.
        now: this node's clock.

    Raises:
        NotTheDoctorError: something else listens there.
        OSError: it was not reached in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, seconds)) as connection:
                return _compare(connection, node, now)
        except NotTheDoctorError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _compare(connection: socket.socket, node: str, now: Callable[[], float]) -> Clock:
    """Ask a few times and keep the answer that took the shortest way."""
    best: Clock | None = None
    with connection.makefile("rw") as lines:
        for _ in range(_ROUNDS):
            asked = now()
            lines.write(json.dumps({"greeting": GREETING, "node": node}) + "\n")
            lines.flush()
            answer = _read(lines.readline(_LINE))
            heard = now()
            on_the_way = (heard - asked) - (answer["sent"] - answer["received"])
            ahead = ((asked - answer["received"]) + (heard - answer["sent"])) / 2
            if best is None or on_the_way / 2 < best.error:
                best = Clock(ahead=ahead, error=on_the_way / 2)
    assert best is not None, "there is at least one round"
    return best


def _read(line: str) -> dict[str, float]:
    try:
        answer = json.loads(line)
        if answer["greeting"] != GREETING:
            raise ValueError
        return {name: float(answer[name]) for name in ("received", "sent")}
    except (ValueError, KeyError, TypeError) as error:
        raise NotTheDoctorError(f"answered {line[:40]!r}") from error
