"""``disagg-proxy cluster``: start, look at, scale, drain and stop the service on a Ray cluster.

Exit codes: 0 done, 1 it does not serve or did not work, 2 a bad command or cluster file, 3 no Ray or nothing runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_NO_RAY = 'Ray is not installed here: pip install "disagg-proxy[ray]"'
_POLL = 1.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disagg-proxy cluster",
        description="The same service on the nodes of a Ray cluster (docs/cluster.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--address", default="auto", metavar="HOST:PORT", help="of the Ray cluster; auto: this node's")
    parser.add_argument("--name", default="", metavar="NAME", help="which application, where several run")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start it, or change what runs to what the file says, without losing requests")
    up.add_argument("file", metavar="FILE", help="cluster file (YAML)")
    up.add_argument("--no-wait", action="store_true", help="return when Serve has accepted it")
    check = commands.add_parser("check", help="check the cluster file on every node; start nothing")
    check.add_argument("file", metavar="FILE", help="cluster file (YAML)")
    commands.add_parser("status", help="nodes, replicas, and engines as the proxies see them")
    scale = commands.add_parser("scale", help="change the number of engines; those that leave are drained first")
    scale.add_argument("counts", nargs="+", metavar="ROLE=COUNT", help="such as prefill=3 decode=2")
    drain = commands.add_parser("drain", help="send no more requests to engines, and wait until theirs have ended")
    drain.add_argument("target", metavar="ENGINE|NODE", help="HOST:PORT of an engine, or the address of a node")
    drain.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="how long to wait (default: 300)")
    undrain = commands.add_parser("undrain", help="the opposite of drain")
    undrain.add_argument("target", metavar="ENGINE|NODE", help="HOST:PORT of an engine, or the address of a node")
    commands.add_parser("down", help="stop it; accepted requests are answered first")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; see the module for the exit codes."""
    args = _parser().parse_args(argv)
    from disagg_ray.settings import ClusterFileError

    try:
        raw = _file(args.file) if args.command in ("up", "check") else {}
        counts = _counts(args.counts) if args.command == "scale" else {}
        try:
            from disagg_ray import service
        except ImportError as error:
            return _fail(3, f"{_NO_RAY} ({error})")
    except ClusterFileError as error:
        return _fail(2, str(error))
    import ray

    try:
        service.connect(args.address)
        if args.command == "up":
            return _up(service, raw, not args.no_wait)
        if args.command == "check":
            return _check(service, raw)
        raw = service.raw_of(args.name)
        if args.command == "status":
            return _status(service, raw)
        if args.command == "scale":
            return _scale(service, raw, counts)
        if args.command == "down":
            service.delete(raw["name"])
            print(f"{raw['name']}: stopped")
            return 0
        return _drain(service, raw, args.target, args.wait if args.command == "drain" else None)
    except ClusterFileError as error:
        return _fail(2, str(error))
    except (service.NoCluster, service.NotRunning) as error:
        return _fail(3, str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


def _fail(code: int, message: str) -> int:
    print(f"disagg-proxy cluster: {message}", file=sys.stderr)
    return code


def _file(path: str) -> dict[str, Any]:
    """The content of a cluster file, checked."""
    from disagg_ray import settings

    try:
        raw = settings.load(path)
    except ImportError:
        raise settings.ClusterFileError(_NO_RAY) from None
    settings.parse(raw)
    return raw


def _counts(words: Sequence[str]) -> dict[str, int]:
    from disagg_ray.settings import ROLES, ClusterFileError

    found: dict[str, int] = {}
    for word in words:
        role, _, count = word.partition("=")
        if role not in ROLES or not (count.isascii() and count.isdigit() and 1 <= int(count) <= 4096):
            raise ClusterFileError(f"{word!r} is not prefill=COUNT or decode=COUNT")
        found[role] = int(count)
    return found


def _problems(service: ModuleType, raw: dict[str, Any]) -> list[str]:
    from disagg_ray import preflight, settings

    cluster = settings.parse(raw)
    nodes = service.hosts()
    found = service.reports(cluster, raw, nodes)
    return preflight.problems(cluster, nodes, found, running=cluster.name in service.names())


def _check(service: ModuleType, raw: dict[str, Any]) -> int:
    problems = _problems(service, raw)
    for line in problems:
        print(line, file=sys.stderr)
    if not problems:
        print(f"{raw['name']}: can start on {len(service.hosts())} nodes")
    return 1 if problems else 0


def _up(service: ModuleType, raw: dict[str, Any], wait: bool) -> int:
    problems = _problems(service, raw)
    if problems:
        for line in problems:
            print(line, file=sys.stderr)
        return _fail(1, "nothing was started")
    service.deploy(raw)
    return _until_running(service, raw) if wait else 0


def _until_running(service: ModuleType, raw: dict[str, Any]) -> int:
    """Print progress until the application runs or has failed."""
    from disagg_ray import settings

    shown: dict[str, str] = {}
    while True:
        status, message, deployments = service.deployments(raw["name"])
        for one in deployments:
            states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(one.replicas.items()) if count)
            line = f"{one.name}: {states or one.status.lower()}"
            if one.status != "HEALTHY" and one.message:
                line += f" ({' '.join(one.message.split())[:300]})"
            if shown.get(one.name) != line:
                shown[one.name] = line
                print(line, flush=True)
        if status == "RUNNING" and all(one.status == "HEALTHY" for one in deployments):
            urls = ", ".join(service.proxies(settings.parse(raw)).urls)
            print(f"{raw['name']}: serves at {urls}")
            return 0
        if status == "DEPLOY_FAILED":
            return _fail(1, f"{raw['name']} does not start: {' '.join(message.split())[:600]}")
        time.sleep(_POLL)


def _status(service: ModuleType, raw: dict[str, Any]) -> int:
    from disagg_ray import status

    view = service.view(raw["name"], raw)
    for line in status.lines(view):
        print(line)
    return 0 if status.healthy(view) else 1


def _scale(service: ModuleType, raw: dict[str, Any], counts: dict[str, int]) -> int:
    from disagg_ray import settings

    return _up(service, settings.scaled(raw, counts), wait=True)


def _drain(service: ModuleType, raw: dict[str, Any], target: str, wait: float | None) -> int:
    """Drain for at most ``wait`` seconds, or undrain where that is None."""
    from disagg_ray import settings

    proxies = service.proxies(settings.parse(raw))
    known = {engine["http_address"] for engines in proxies.instances().values() if engines for engine in engines}
    chosen = sorted(one for one in known if target in (one, one.rpartition(":")[0].strip("[]")))
    if not chosen:
        return _fail(2, f"{target}: no proxy knows such an engine or node ({', '.join(sorted(known)) or 'none'})")
    code = 0
    for engine in chosen:
        if wait is None:
            proxies.undrain(engine)
            print(f"{engine}: gets requests again")
        elif proxies.drain(engine, wait):
            print(f"{engine}: drained")
        else:
            code = _fail(1, f"{engine}: drained, but still has requests after {wait:g} s")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
