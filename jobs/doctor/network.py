"""Addresses, ports and NCCL's variables, seen from one node."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.report import Needs

LISTS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables that name network interfaces; NCCL's takes prefixes, `=` and `^`, gloo's and TensorPipe's take names."""


def interfaces() -> dict[str, bool]:
    """Return the network interfaces of this host and whether each is up."""
    return {name: state.isup for name, state in psutil.net_if_stats().items()}


def check_interfaces(
    needs: Needs, environment: Mapping[str, str], there: Mapping[str, bool]
) -> list[Finding]:
    """Check that the interfaces that the environment names exist and are up.

    Args:
        needs: of the run.
        environment: environment variables.
        there: interfaces and whether they are up.
    """
    found = []
    for variable in LISTS:
        given = environment.get(variable)
        if given is None:
            continue
        matching = matches(given, list(there), prefixes=variable.startswith("NCCL"))
        used = needs.use_gpu == variable.startswith("NCCL")
        up = [name for name in matching if there[name]]
        if up:
            found.append(ok(variable, f"{given} selects {', '.join(up)}"))
            continue
        says = f"{given!r} selects {'interfaces that are down: ' + ', '.join(matching) if matching else 'no interface'}"
        says += f"; there are {', '.join(sorted(there))}"
        remedy = f"set {variable} to one that other nodes reach, or unset it"
        say = fail if used else warn
        found.append(say(variable, says if used else f"{says} (this run does not read it)", remedy))
    return found


def matches(given: str, names: list[str], *, prefixes: bool) -> list[str]:
    """Return the interfaces that a list selects, as NCCL reads it.

    Args:
        given: comma-separated; with `prefixes`, a leading ^ excludes and a leading = (after it) means whole names.
        names: interfaces of the host.
        prefixes: False: whole names alone, as gloo reads it.
    """
    excluded = prefixes and given.startswith("^")
    body = given[1:] if excluded else given
    exact = not prefixes or body.startswith("=")
    wanted = [part.strip() for part in body.removeprefix("=").split(",") if part.strip()]

    def selected(name: str) -> bool:
        return any(name == part or (not exact and name.startswith(part)) for part in wanted)

    return [name for name in names if selected(name) != excluded]


def check_nccl(
    needs: Needs, environment: Mapping[str, str], gpus: int, devices: Path = Path("/sys/class/infiniband")
) -> list[Finding]:
    """Check NCCL's switches, which people set while looking for a fault and forget.

    Args:
        needs: of the run.
        environment: environment variables.
        gpus: GPUs of this node.
        devices: where the kernel lists InfiniBand and RoCE adapters.
    """
    if not needs.use_gpu:
        return []
    adapters = sorted(entry.name for entry in devices.iterdir()) if devices.is_dir() else []
    found = []
    if _is_on(environment.get("NCCL_P2P_DISABLE")) and gpus > 1:
        says = f"set: {gpus} GPUs of this node exchange data through host memory instead of NVLink"
        found.append(warn("NCCL_P2P_DISABLE", says, "unset NCCL_P2P_DISABLE"))
    if _is_on(environment.get("NCCL_IB_DISABLE")) and adapters and needs.nodes > 1:
        says = f"set although there are {', '.join(adapters)}: nodes exchange data through TCP"
        found.append(warn("NCCL_IB_DISABLE", says, "unset NCCL_IB_DISABLE"))
    wanted = environment.get("NCCL_IB_HCA")
    if wanted is not None and not matches(
        ",".join(p.split(":")[0] for p in wanted.split(",")), adapters, prefixes=True
    ):
        says = f"{wanted!r} selects no adapter; there are {', '.join(adapters) or 'none'}"
        found.append(fail("NCCL_IB_HCA", says, "name an adapter of ls /sys/class/infiniband, or unset it"))
    level = environment.get("NCCL_DEBUG", "").upper()
    if level in ("INFO", "TRACE"):
        says = f"{level}: every process writes pages of log"
        found.append(warn("NCCL_DEBUG", says, "set NCCL_DEBUG=WARN: errors alone"))
    return found or [ok("NCCL variables", "none stands in the way")]


def _is_on(value: str | None) -> bool:
    return value is not None and value.strip() not in ("", "0")


def check_master_variables(environment: Mapping[str, str]) -> list[Finding]:
    """Check the variables that a launcher of several processes has to set, where one has set some of them."""
    if int(environment.get("WORLD_SIZE", "1") or 1) <= 1:
        return []
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if not environment.get(name)]
    if not missing:
        return [ok("MASTER_ADDR", f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}")]
    return [
        fail(
            "MASTER_ADDR",
            f"WORLD_SIZE={environment['WORLD_SIZE']} but {', '.join(missing)} missing: processes would wait for one "
            "another for ever",
            "export the address and a free port of the first node on all nodes, or start with flamingo train, which "
            "needs none of them",
        )
    ]


def check_address(address: str, hosts: int) -> Finding:
    """Check that the master's address resolves, and not to a loopback where there are several hosts.

    Args:
        address: name or number.
        hosts: machines of the run.
    """
    try:
        numbers = sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
        )
    except OSError as error:
        return fail(
            "master address",
            f"{address!r} does not resolve here ({error})",
            "set FLAMINGO_HEAD_IP (or --master-addr) to the first node's address in the nodes' own network",
        )
    loopback = [number for number in numbers if ipaddress.ip_address(number.split("%")[0]).is_loopback]
    if loopback and hosts > 1:
        return fail(
            "master address",
            f"{address} is {loopback[0]} here: every node would look for the master on itself",
            "set FLAMINGO_HEAD_IP (or --master-addr) to the first node's address in the nodes' own network; "
            "Debian's /etc/hosts maps a host's own name to 127.0.1.1",
        )
    return ok("master address", f"{address} is {', '.join(numbers)}")


def check_port(address: str, port: int) -> Finding:
    """Check that this host can listen on a port of one of its addresses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((address, port))
            tried.listen(1)
        except OSError as error:
            return port_in_use(address, port, error)
    return ok("master port", f"{address}:{port} is free")


def port_in_use(address: str, port: int, error: OSError) -> Finding:
    """Return what is wrong with a port that cannot be listened on, and who holds it if that may be known."""
    owners = set()
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                owners.add(f"{psutil.Process(each.pid).name()} (process {each.pid})")
    held = f", held by {', '.join(sorted(owners))}" if owners else ""
    return fail(
        "master port",
        f"{address}:{port} cannot be listened on ({os.strerror(error.errno or 0)}){held}",
        "end that process, or choose another port: FLAMINGO_RAY_PORT (or --master-port)",
    )
