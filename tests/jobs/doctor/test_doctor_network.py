"""Ports that are really occupied, interfaces that really exist, clocks that are told to be wrong."""

import dataclasses
import json
import socket
import threading
import time

import pytest

from jobs.doctor.clocks import check_skew, check_synchronised, synchronised
from jobs.doctor.meeting import NotTheDoctorError, call, listen
from jobs.doctor.network import (
    check_address,
    check_interfaces,
    check_master_variables,
    check_nccl,
    check_port,
    interfaces,
    matches,
)
from jobs.doctor.node import attend, call_in
from jobs.doctor.report import Clock, Needs, NodeReport

NEEDS = Needs(
    processes=1, threads=1, use_gpu=True, host_bytes=0, object_bytes=0, run_dir="/nowhere", seconds=5
)


def test_an_occupied_port_is_named_with_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        finding = check_port("127.0.0.1", port)
        assert (finding.level, finding.check) == ("fail", "master port")
        assert f"127.0.0.1:{port} cannot be listened on" in finding.says
        assert "held by python" in finding.says
        assert "FLAMINGO_RAY_PORT" in finding.remedy
    assert check_port("127.0.0.1", port).level == "ok"


def test_interfaces_are_read_as_nccl_reads_them():
    names = ["lo", "eth0", "eth1", "docker0"]
    assert matches("eth", names, prefixes=True) == ["eth0", "eth1"]
    assert matches("=eth", names, prefixes=True) == []
    assert matches("=eth0,docker0", names, prefixes=True) == ["eth0", "docker0"]
    assert matches("^lo,docker", names, prefixes=True) == ["eth0", "eth1"]
    assert matches("^=eth0", names, prefixes=True) == ["lo", "eth1", "docker0"]
    assert matches("eth", names, prefixes=False) == []


def test_an_interface_that_does_not_exist_fails_a_run_on_gpus():
    there = interfaces()
    assert there, "every Linux host has a loopback"
    wrong = {"NCCL_SOCKET_IFNAME": "bogus7"}
    (finding,) = check_interfaces(NEEDS, wrong, there)
    assert finding.level == "fail"
    assert "'bogus7' selects no interface" in finding.says
    assert all(name in finding.says for name in there)
    (finding,) = check_interfaces(dataclasses.replace(NEEDS, use_gpu=False), wrong, there)
    assert finding.level == "warn"
    (finding,) = check_interfaces(NEEDS, {"NCCL_SOCKET_IFNAME": "eth"}, {"eth0": False, "lo": True})
    assert "down: eth0" in finding.says
    up = next(name for name, is_up in there.items() if is_up)
    (finding,) = check_interfaces(NEEDS, {"NCCL_SOCKET_IFNAME": f"={up}"}, there)
    assert finding.level == "ok"


def test_switches_of_nccl_that_were_forgotten(tmp_path):
    (tmp_path / "mlx5_0").mkdir()
    given = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "info", "NCCL_IB_HCA": "efa:1"}
    found = check_nccl(dataclasses.replace(NEEDS, nodes=2), given, 8, tmp_path)
    assert {f.check: f.level for f in found} == {
        "NCCL_P2P_DISABLE": "warn",
        "NCCL_IB_DISABLE": "warn",
        "NCCL_DEBUG": "warn",
        "NCCL_IB_HCA": "fail",
    }
    harmless = {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5"}
    assert [f.level for f in check_nccl(NEEDS, harmless, 8, tmp_path)] == ["ok"]


def test_a_launcher_without_master_address():
    (finding,) = check_master_variables({"WORLD_SIZE": "8", "RANK": "0"})
    assert finding.level == "fail"
    assert "MASTER_ADDR, MASTER_PORT missing" in finding.says
    (finding,) = check_master_variables(
        {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    )
    assert finding.level == "ok"
    assert check_master_variables({}) == []


def test_an_address_that_is_a_loopback_or_nothing():
    assert check_address("localhost", hosts=1).level == "ok"
    assert "look for the master on itself" in check_address("127.0.1.1", hosts=2).says
    assert "does not resolve" in check_address("no-such-host.invalid", hosts=2).says


def test_nodes_meet_and_compare_clocks():
    meeting = listen("127.0.0.1", 0)
    try:
        exact = call("127.0.0.1", meeting.port, "n2", 5)
        late = call("127.0.0.1", meeting.port, "n3", 5, now=lambda: time.time() - 90)
        assert meeting.wait_for(2, 5) == {"n2", "n3"}
        assert meeting.wait_for(3, 0.05) == {"n2", "n3"}
    finally:
        meeting.close()
    assert abs(exact.ahead) <= exact.error + 0.001
    assert late.ahead == pytest.approx(-90, abs=late.error + 0.001)
    reports = [
        NodeReport(node=name, host=name, cores=1, clock=clock)
        for name, clock in (("n1", None), ("n2", exact), ("n3", late))
    ]
    (finding,) = check_skew(reports)
    assert finding.level == "fail"
    assert "n3 is 90.0 s behind" in finding.says
    assert check_skew(reports[:2])[0].level == "ok"
    assert check_skew(reports[:1]) == []
    slightly = NodeReport(node="n4", host="n4", cores=1, clock=Clock(ahead=3.0, error=0.1))
    assert check_skew([slightly])[0].level == "warn"


def test_a_port_where_something_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        address = server.getsockname()
        finding, clock = call_in(dataclasses.replace(NEEDS, meeting=address), "n2")
        thread.join()
    assert clock is None
    assert finding.level == "fail"
    assert "HTTP/1.1 400" in finding.says


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()
    finding, _ = call_in(dataclasses.replace(NEEDS, meeting=free, seconds=0.3), "n2")
    assert finding.level == "fail"
    assert "firewall" in finding.remedy


def test_a_stranger_at_the_meeting_is_not_counted():
    meeting = listen("127.0.0.1", 0)
    try:
        with socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
            stranger.sendall(json.dumps({"greeting": "hello", "node": "x"}).encode() + b"\n")
            assert stranger.recv(100) == b""
        assert meeting.wait_for(1, 0.05) == set()
    finally:
        meeting.close()
    assert issubclass(NotTheDoctorError, OSError)


def test_the_first_node_says_who_did_not_come():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        needs = dataclasses.replace(NEEDS, use_gpu=False, nodes=2, meeting=taken.getsockname(), seconds=0.1)
        report = attend(needs, {}, node="n1", is_first=True)
        assert report.findings[0].level == "fail"
        assert "cannot be listened on" in report.findings[0].says
    report = attend(needs, {}, node="n1", is_first=True)
    assert "0 of 1 other nodes called" in report.findings[0].says
    assert {finding.node for finding in report.findings} == {"n1"}
    assert NodeReport.from_json(report.to_json()) == report
    assert Needs.from_json(needs.to_json()) == needs


def test_the_kernel_tells_whether_its_clock_is_synchronised():
    assert synchronised() in (True, False, None)
    assert [check_synchronised(state).level for state in (True, None, False)] == ["ok", "ok", "warn"]
