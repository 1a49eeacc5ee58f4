"""Clocks: whether the kernel thinks that this one is synchronised, and how far those of the nodes are apart."""

import ctypes
from collections.abc import Sequence

from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.report import NodeReport

NOTICED = 1.0
"""Seconds apart from which logs of several nodes can no longer be put in order."""
BROKEN = 60.0
"""Seconds apart from which caches, tokens of object stores (S3 refuses 15 minutes) and time-outs go wrong."""
_TIME_ERROR = 5
_BYTES_OF_TIMEX = 256  # 208 on 64-bit Linux


def synchronised() -> bool | None:
    """Ask the kernel whether something (NTP, PTP) disciplines its clock; None where it does not tell.

    `adjtimex` with modes 0 reads, and needs no rights, no systemd and no chrony.
    """
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_BYTES_OF_TIMEX))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def check_synchronised(state: bool | None) -> Finding:
    """Turn the kernel's answer into a finding."""
    if state is None:
        return ok("clock", "the kernel does not tell whether it is synchronised")
    if state:
        return ok("clock", "synchronised")
    return warn(
        "clock",
        "the kernel's clock is not synchronised: it will drift from the other nodes'",
        "start chronyd or systemd-timesyncd (timedatectl set-ntp true); in a container, on its host",
    )


def check_skew(reports: Sequence[NodeReport]) -> list[Finding]:
    """Check the nodes' clocks against the one of the node where they met."""
    known = [(report.node, report.clock) for report in reports if report.clock is not None]
    if not known:
        return []
    # The meeting node's own offset is 0, so the spread is that of all, it included.
    ahead = {node: clock.ahead for node, clock in known}
    early, late = min(0.0, *ahead.values()), max(0.0, *ahead.values())
    apart, error = late - early, max(clock.error for _, clock in known)
    worst = max(ahead, key=lambda node: abs(ahead[node]))
    says = f"clocks of {len(known) + 1} nodes are {apart:.3f} s apart (known to {error:.3f} s)"
    if apart - error < NOTICED:
        return [ok("clock skew", says)]
    says += f"; {worst} is {abs(ahead[worst]):.1f} s {'ahead' if ahead[worst] > 0 else 'behind'}"
    remedy = f"synchronise {worst}: chronyc makestep, or timedatectl set-ntp true"
    return [(fail if apart - error > BROKEN else warn)("clock skew", says, remedy)]
