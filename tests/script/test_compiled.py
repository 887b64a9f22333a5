"""The compiled hot path, with a compiler that compiles nothing: when it is built, used, and not used."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_machine import proc
from tests.fake_compiler import FakeCompiler, builds, make_checkout
from tests.script.machine import REPOSITORY, Machine, wait_for

# Several starts, which are slow on a busy machine.
pytestmark = pytest.mark.timeout(300)


class Checkout(Machine):
    """A machine of a checkout of its own, with a compiler."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = make_checkout(folder / "check out", REPOSITORY)
        cache = folder / "cache dir"
        self.compiler = FakeCompiler(cache, self.folder)
        self.env |= {"PROXY_COMPILED": "auto", "XDG_CACHE_HOME": str(cache), "DISAGG_KV_SECRET": "s3cret"}

    def command(self, *words: str) -> list[str]:
        return [str(self.folder / "test_single_machine.sh"), *words]

    def clean_up(self) -> dict[int, str]:
        # Workers are no part of the proxy's process group: they need the time that it takes to end them.
        self.run("stop")
        return super().clean_up()

    @property
    def compiled(self) -> bool:
        """What the proxy that runs says."""
        value = self.get("/stats")["compiled"]
        assert isinstance(value, bool)
        return value

    def build_pid(self) -> int:
        """The build that runs; 0 when none does."""
        return int(self.fields("compile").get("pid", 0))

    def built(self) -> None:
        """Wait for the end of the build."""
        wait_for(lambda: not self.build_pid())

    def edit(self, name: str = "disagg_proxy/errors.py") -> None:
        with open(self.folder / name, "a") as file:
            file.write("\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    one = Checkout(tmp_path / "a folder")
    yield one
    assert one.clean_up() == {}


def test_the_next_start_uses_what_was_built_beside_the_first(checkout: Checkout) -> None:
    checkout.compiler.hold()
    first = checkout.ok("all")
    assert "being compiled" in first.stderr and str(checkout.log_dir / "compile.log") in first.stderr
    assert not checkout.compiled
    wait_for(lambda: bool(checkout.compiler.pids))
    assert "being compiled" in checkout.ok("status").stdout

    # Another process group, lowest priority; what it starts has that, too.
    pid = checkout.build_pid()
    (compiling,) = checkout.compiler.pids
    stats = [proc.read_stat(one) for one in (pid, compiling)]
    assert [stat.group for stat in stats if stat] == [pid, pid]
    assert [os.getpriority(os.PRIO_PROCESS, one) for one in (pid, compiling)] == [19, 19]
    assert Path(f"/proc/{compiling}/oom_score_adj").read_text().strip() == "1000"

    checkout.compiler.go_on()
    checkout.built()
    assert "is ready" in checkout.ok("status").stdout and not checkout.compiled
    assert "is compiled" in checkout.ok("restart", "proxy").stderr
    assert checkout.compiled and checkout.complete()["choices"]
    rows = checkout.ok("status").stdout.splitlines()
    assert [line.strip() for line in rows].count("compiled") == 1

    # What the supervisor brings back is the same.
    dead = checkout.pid("proxy")
    os.kill(dead, signal.SIGKILL)
    wait_for(lambda: checkout.fields("proxy").get("pid") not in ("0", str(dead)) and bool(checkout.get("/stats")))
    assert checkout.compiled

    # A change, anywhere in what the proxy consists of: never the old native code.
    checkout.edit("disagg_proxy/page/web/main.js")
    assert "being compiled" in checkout.ok("restart", "proxy").stderr
    assert not checkout.compiled
    checkout.built()
    assert "is compiled" in checkout.ok("restart", "proxy").stderr and checkout.compiled
    checkout.ok("stop")
    assert len(checkout.compiler.pids) == 2


def test_stop_ends_a_build_and_the_next_start_begins_it_anew(checkout: Checkout) -> None:
    checkout.compiler.hold()
    checkout.ok("all")
    wait_for(lambda: bool(checkout.compiler.pids))
    checkout.ok("stop")
    assert checkout.leftovers() == {} and builds(checkout.compiler.store) == []
    again = checkout.ok("all")
    assert "being compiled" in again.stderr
    wait_for(lambda: len(checkout.compiler.pids) == 2)


def test_stop_ends_a_restart_that_waits_for_its_build(checkout: Checkout) -> None:
    checkout.ok("all", PROXY_COMPILED="0")
    checkout.compiler.hold()
    waiting = checkout.start("restart", "proxy", PROXY_COMPILED="1")
    wait_for(lambda: bool(checkout.compiler.pids))
    assert checkout.get("/stats")["compiled"] is False, "the old one serves meanwhile"
    checkout.ok("stop")
    assert waiting.wait(60) == 1 and checkout.leftovers() == {}


def test_a_failed_build_is_one_warning_and_not_tried_again(checkout: Checkout) -> None:
    checkout.compiler.fail()
    checkout.ok("all")
    checkout.built()
    assert "internal compiler error" in checkout.log("compile")
    assert "could not be compiled, see" in checkout.ok("status").stdout
    again = checkout.ok("restart", "proxy").stderr
    assert again.count("compile.log") == 1 and not checkout.compiled and not checkout.build_pid()
    asked = checkout.run("restart", "proxy", PROXY_COMPILED="1")
    assert asked.returncode == 1 and "internal compiler error" in asked.stderr and "PROXY_COMPILED=1" in asked.stderr
    assert checkout.get("/stats")["compiled"] is False, "the proxy that ran goes on"
    assert len(checkout.compiler.pids) == 2
    checkout.edit()
    checkout.compiler.fail(False)
    assert "being compiled" in checkout.ok("restart", "proxy").stderr
    checkout.built()
    assert len(builds(checkout.compiler.store)) == 1


def test_a_killed_build_counts_as_failed(checkout: Checkout) -> None:
    checkout.compiler.hold()
    checkout.ok("all")
    wait_for(lambda: bool(checkout.compiler.pids))
    os.killpg(checkout.build_pid(), signal.SIGKILL)
    wait_for(lambda: proc.group_members(checkout.build_pid()) == [])
    assert "could not be compiled, see" in checkout.ok("restart", "proxy").stderr
    assert len(checkout.compiler.pids) == 1


def test_the_start_can_wait_for_the_build_also_with_workers(checkout: Checkout) -> None:
    done = checkout.ok("all", PROXY_COMPILED="1", EXTRA_PROXY_ARGS="--workers 2")
    assert "is compiled" in done.stderr
    assert {checkout.compiled for _ in range(20)} == {True}
    assert len(checkout.get("/stats")["workers"]) == 2
    # The whole of it comes from the build: what the checkout gets now is for the next start.
    checkout.edit()
    build = checkout.compiler.store.folder / builds(checkout.compiler.store)[0]
    assert checkout.fields("proxy")["server"] == str(build / "disagg_prefill_proxy_server.py")
    assert "is compiled" not in checkout.ok("restart", "proxy", PROXY_COMPILED="0").stderr
    assert not checkout.compiled and len(checkout.compiler.pids) == 1
