"""Ports of one node."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from disagg_machine import proc
from disagg_ray import claims
from disagg_ray.claims import NoPort
from tests.ports import hold_port

HOST = "127.0.0.1"


def listening(hold: ExitStack) -> int:
    server = hold.enter_context(socket.socket())
    server.bind((HOST, 0))
    server.listen()
    return int(server.getsockname()[1])


def test_two_replicas_never_get_the_same_port(tmp_path: Path) -> None:
    with ExitStack() as hold:
        port = hold_port(hold)
        run_dir = str(tmp_path)
        one = claims.claim(run_dir, HOST, "http", (port, port))
        with pytest.raises(NoPort, match=f"ports.http: no 1 free of {port}-{port} on {HOST}"):
            claims.claim(run_dir, HOST, "http", (port, port))
        one.release()
        claims.claim(run_dir, HOST, "http", (port, port)).release()


def test_a_port_that_somebody_else_uses_is_passed_over(tmp_path: Path) -> None:
    with ExitStack() as hold:
        port = listening(hold)
        with pytest.raises(NoPort):
            claims.claim(str(tmp_path), HOST, "kv", (port, port))
        assert list((tmp_path / "claims").iterdir()) == [], "a claim that is of no use is given back"


def test_an_engine_with_several_gpus_gets_consecutive_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "may_bind", lambda host, port: port != 101)
    claim = claims.claim(str(tmp_path), HOST, "kv", (100, 105), stride=2)
    assert claim.port == 102
    assert claims.claim(str(tmp_path), HOST, "kv", (100, 105), stride=2).port == 104
    with pytest.raises(NoPort, match="no 2 free of 100-105"):
        claims.claim(str(tmp_path), HOST, "kv", (100, 105), stride=2)


def test_a_process_that_got_the_number_later_is_not_killed(tmp_path: Path) -> None:
    """This process itself has the recorded number here, with another start time, or from another boot."""
    base = claims.folder(str(tmp_path))
    for text in (f"{os.getpgid(0)} 1 {proc.boot_id()}", f"{os.getpgid(0)} 1 another-boot", "", "1 2"):
        (base / f"http-{HOST}-1").write_text(text)
        assert claims.sweep(str(tmp_path), HOST) == 1


def test_another_nodes_claims_are_its_own(tmp_path: Path) -> None:
    """Nodes may share the folder."""
    base = claims.folder(str(tmp_path))
    (base / "http-10.0.0.2-20000").touch()
    assert claims.sweep(str(tmp_path), HOST) == 0 and len(list(base.iterdir())) == 1
