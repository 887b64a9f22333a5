"""Ports of one node: each is claimed by one replica, and what a dead replica left behind is ended.

A claim is a file in ``RUN_DIR/claims``, named by address and HTTP port, and locked by the replica and its keeper for as
long as they live; the kernel releases it with them. It holds the engine's process group and start time. A file without
a lock belongs to a dead replica: what is left of its process group is killed before the file is used again. A claim
keeps replicas apart; the bind test finds everybody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from disagg_machine import proc


class NoPort(Exception):
    """No port of the range is free; the text names the range's setting."""


class Claim:
    """One port, with the lock that makes it this replica's.

    Attributes:
        port: the first of ``stride`` consecutive ports.
        fd: descriptor of the locked file; the keeper inherits it.
    """

    def __init__(self, path: Path, port: int, fd: int) -> None:
        self.path, self.port, self.fd = path, port, fd

    def record(self, pid: int) -> None:
        """Note the process whose group is to be ended with this replica."""
        stat = proc.read_stat(pid)
        start = stat.start if stat is not None else ""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{pid} {start} {proc.boot_id()}\n".encode(), 0)

    def release(self) -> None:
        """Give the port back."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.fd)


def folder(run_dir: str) -> Path:
    """``RUN_DIR/claims``, made where it is missing.

    Raises:
        PermissionError: RUN_DIR belongs to somebody else.
    """
    base = Path(run_dir)
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"run_dir: {base} belongs to another user")
    claims = base / "claims"
    claims.mkdir(mode=0o700, exist_ok=True)
    return claims


def claim(run_dir: str, host: str, kind: str, ports: tuple[int, int], stride: int = 1) -> Claim:
    """The first free port of a range.

    Args:
        kind: the range's name in the cluster file.
        stride: consecutive ports that are needed.

    Raises:
        NoPort: none is free.
    """
    base = folder(run_dir)
    first, last = ports
    for port in range(first, last - stride + 2, stride):
        if (found := claim_port(base, host, kind, port)) is None:
            continue
        if all(may_bind(host, one) for one in range(port, port + stride)):
            return found
        found.release()
    raise NoPort(f"ports.{kind}: no {stride} free of {first}-{last} on {host}")


def claim_port(base: Path, host: str, kind: str, port: int) -> Claim | None:
    """The claim to one port; None while another replica has it."""
    path = base / f"{kind}-{host}-{port}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    # The file may have been removed by its last owner between open and lock.
    if not _is_file(path, fd):
        os.close(fd)
        return None
    _end_left_over(fd)
    return Claim(path, port, fd)


def sweep(run_dir: str, host: str) -> int:
    """End what dead replicas of this node left behind, and remove their claims. Returns how many there were."""
    swept = 0
    for path in _claims_of(folder(run_dir), host):
        kind, _, rest = path.name.partition("-")
        if (one := claim_port(path.parent, host, kind, int(rest.rpartition("-")[2]))) is not None:
            one.release()
            swept += 1
    return swept


def _claims_of(base: Path, host: str) -> Iterator[Path]:
    for path in sorted(base.iterdir()):
        if path.name.partition("-")[2].rpartition("-")[0] == host:
            yield path


def _is_file(path: Path, fd: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return there.st_ino == os.fstat(fd).st_ino


def _end_left_over(fd: int) -> None:
    """Kill the process group that a dead replica has recorded, if it is still that one."""
    fields = os.pread(fd, 200, 0).decode("ascii", "replace").split()
    if len(fields) != 3 or fields[2] != proc.boot_id():
        return
    group, start = int(fields[0]), fields[1]
    leader = proc.read_stat(group)
    # Without its leader the number cannot have been given to another group while this one has members.
    if leader is not None and leader.runs and leader.start != start:
        return
    if proc.group_members(group):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def may_bind(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
