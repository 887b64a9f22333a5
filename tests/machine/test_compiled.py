"""Builds of the hot path: what they are named by, one at a time, what is kept. The compiler compiles nothing."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_machine import bench, files, messages, net, proc
from disagg_machine.compiled import build, control, identity, store
from disagg_machine.compiled.control import Look, State
from disagg_machine.compiled.store import IN_USE, TOOLS_KEPT, Store
from disagg_machine.context import Context
from disagg_machine.messages import MachineError
from disagg_machine.settings import load
from tests.fake_compiler import MODULE, FakeCompiler, builds, make_checkout

# Each build is a handful of processes, which are slow on a busy machine.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
PYTHON = identity.python_build(sys.executable)
assert PYTHON is not None


@pytest.fixture(autouse=True)
def in_english() -> None:
    messages.use("en")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "check out", ROOT)


@pytest.fixture
def compiler(tmp_path: Path, checkout: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "cache", checkout)


def context_of(checkout: Path, **environ: str) -> Context:
    folder = checkout.parent
    environ = {"RUN_DIR": str(folder / f"run of {checkout.name}"), "XDG_CACHE_HOME": str(folder / "cache"), **environ}
    Path(environ["RUN_DIR"]).mkdir(exist_ok=True)
    return Context(load(environ, checkout, checkout), checkout, {**os.environ, **environ}, "script")


def name_of(checkout: Path) -> str:
    assert PYTHON is not None
    return identity.digest(checkout, PYTHON)


def begin(checkout: Path) -> subprocess.Popen[bytes]:
    """The process that builds."""
    environ = context_of(checkout).environ
    program = [sys.executable, str(checkout / "disagg_machine/__main__.py"), "__compile", sys.executable]
    return subprocess.Popen(program, env=environ, cwd=checkout, stdin=subprocess.DEVNULL)


def until(condition: Callable[[], bool]) -> None:
    """Wait for another process; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.02)


def state(checkout: Path, **environ: str) -> State:
    return control.look(context_of(checkout, **environ), sys.executable).state


def edit(path: Path) -> None:
    with open(path, "a") as file:
        file.write("\n")


# -- what a build is bound to


@pytest.mark.parametrize(
    "name", ["setup.py", "disagg_proxy/errors.py", f"{MODULE}.py", "disagg_proxy/page/web/page.css"]
)
def test_every_source_counts(checkout: Path, name: str) -> None:
    before = name_of(checkout)
    edit(checkout / name)
    assert name_of(checkout) != before


def test_names_and_limits_of_files_count(checkout: Path) -> None:
    before = name_of(checkout)
    (checkout / "disagg_proxy/errors.py").rename(checkout / "disagg_proxy/faults.py")
    renamed = name_of(checkout)
    (checkout / "disagg_proxy/empty.py").touch()
    assert len({before, renamed, name_of(checkout)}) == 3


def test_what_python_or_a_build_has_made_does_not_count(checkout: Path) -> None:
    before = name_of(checkout)
    (checkout / "disagg_proxy/__pycache__").mkdir(exist_ok=True)
    (checkout / "disagg_proxy/__pycache__/errors.cpython-311.pyc").touch()
    (checkout / "disagg_proxy/errors.cpython-311-x86_64-linux-gnu.so").touch()
    (checkout / "README.md").touch()
    assert name_of(checkout) == before


def test_the_python_and_the_recipe_count(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert PYTHON is not None
    other = dataclasses.replace(PYTHON, text=PYTHON.text.replace("linux", "linus"))
    before = name_of(checkout)
    assert identity.digest(checkout, other) != before
    (tmp_path / "build.py").write_text("another recipe")
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "identity.py"))
    assert name_of(checkout) != before


def test_the_compiler_is_pinned_to_what_the_tests_have() -> None:
    version = re.search(r"^mypy==(\S+)$", (ROOT / "constraints-dev.txt").read_text(), re.M)
    assert version and build.compiler(ROOT) == f"mypy[mypyc]=={version[1]}"


# -- building


def test_a_build_is_of_the_sources_as_they_were(checkout: Path, compiler: FakeCompiler) -> None:
    """An edit while it runs, and the way back, as between commits."""
    before, source = name_of(checkout), (checkout / "disagg_proxy/errors.py").read_bytes()
    compiler.hold()
    process = begin(checkout)
    until(lambda: bool(compiler.pids))
    edit(checkout / "disagg_proxy/errors.py")
    compiler.go_on()
    assert process.wait() == 0
    assert builds(compiler.store) == [before] and state(checkout) is State.WANTED
    built = compiler.store.folder / before
    assert (built / "disagg_proxy/errors.py").read_bytes() == source
    assert (built / f"{MODULE}.pyc").exists() and not list(built.glob("tmp")) and not list(built.rglob("tests"))
    (checkout / "disagg_proxy/errors.py").write_bytes(source)
    found = control.look(context_of(checkout), sys.executable)
    assert (found.state, found.folder) == (State.READY, built)


def test_two_at_once_build_once(checkout: Path, compiler: FakeCompiler) -> None:
    compiler.hold()
    processes = [begin(checkout), begin(checkout)]
    until(lambda: bool(compiler.pids))
    assert state(checkout) is State.RUNNING
    compiler.go_on()
    assert [process.wait() for process in processes] == [0, 0]
    assert len(compiler.pids) == 1 and builds(compiler.store) == [name_of(checkout)]


def test_two_checkouts_build_one_after_the_other(checkout: Path, compiler: FakeCompiler) -> None:
    other = make_checkout(checkout.parent / "other", ROOT)
    edit(other / "disagg_proxy/errors.py")
    compiler.hold()
    first = begin(checkout)
    until(lambda: bool(compiler.pids))
    second = begin(other)
    compiler.go_on()
    assert (first.wait(), second.wait()) == (0, 0)
    assert len(compiler.pids) == 2
    assert builds(compiler.store) == [name_of(checkout)]
    assert builds(Store(compiler.store.root, other)) == [name_of(other)]


def test_a_failed_one_is_not_wanted_until_the_sources_change(checkout: Path, compiler: FakeCompiler) -> None:
    compiler.fail()
    assert begin(checkout).wait() == 1
    found = control.look(context_of(checkout), sys.executable)
    assert found.state is State.FAILED and found.log.endswith("compile.log") and builds(compiler.store) == []
    edit(checkout / "disagg_proxy/errors.py")
    assert state(checkout) is State.WANTED
    compiler.fail(False)
    assert begin(checkout).wait() == 0
    assert [path.name for path in compiler.store.folder.glob("*.attempt")] == []


def test_one_that_is_ended_is_wanted_again_and_one_that_is_killed_is_not(
    checkout: Path, compiler: FakeCompiler
) -> None:
    compiler.hold()
    process = begin(checkout)
    until(lambda: len(compiler.pids) == 1)
    process.terminate()
    assert process.wait() == 143 and state(checkout) is State.WANTED
    process = begin(checkout)
    until(lambda: len(compiler.pids) == 2)
    process.kill()
    process.wait()
    assert state(checkout) is State.FAILED
    # What it has started still compiles, and the lock is still held.
    another = begin(checkout)
    assert state(checkout) is State.FAILED and len(compiler.pids) == 2
    compiler.go_on()
    assert another.wait() == 0
    assert state(checkout) is State.READY and len(compiler.pids) == 3
    assert not list(compiler.store.folder.glob("new-*"))


def test_after_a_reboot_a_build_that_was_killed_is_wanted(
    checkout: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.store.prepare()
    compiler.store.note(name_of(checkout), store.RUNNING, checkout / "log")
    assert state(checkout) is State.RUNNING
    monkeypatch.setattr(store.proc, "boot_id", lambda: "another")
    assert state(checkout) is State.WANTED


# -- what is used and kept


def test_only_ones_own_builds_are_used(checkout: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = name_of(checkout)
    (compiler.store.folder / digest).mkdir(parents=True)
    assert state(checkout) is State.READY
    monkeypatch.setattr(files, "is_own", lambda path: path.name != digest)
    assert state(checkout) is State.WANTED


def test_old_builds_are_removed_unless_something_runs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    one, gone = Store(tmp_path / "builds", tmp_path), Store(tmp_path / "builds", tmp_path / "gone")
    for each in (one, gone):
        each.prepare()
    for name, age in {"latest": IN_USE + 1, "old": IN_USE + 1, "running": IN_USE + 1, "starting": 60}.items():
        (one.folder / name).mkdir()
        os.utime(one.folder / name, (now - age, now - age))
    one.note("old", store.FAILED, tmp_path / "log")
    for name, age in {"tools-a": TOOLS_KEPT + 1, "tools-b": 60}.items():
        (one.root / name).mkdir()
        os.utime(one.root / name, (now - age, now - age))
    monkeypatch.setattr(store, "mapped_files", lambda: {f"{one.folder}/running/some.so"})
    one.clean("latest", now)
    assert builds(one) == ["latest", "running", "starting"] and not list(one.folder.glob("*.attempt"))
    assert not gone.folder.exists() and [path.name for path in one.root.glob("tools-*")] == ["tools-b"]


def test_native_code_that_is_loaded_is_seen() -> None:
    import _ctypes

    assert _ctypes.__file__ in store.mapped_files([os.getpid()])


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/home/a"}, "/x"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/a"}, "/home/a/.cache"),
        ({}, "/run dir"),
    ],
)
def test_where_builds_are(environ: dict[str, str], folder: str) -> None:
    assert store.folder(environ, Path("/run dir")) == Path(folder) / "disagg-proxy/compiled"


# -- what keeps it from being built


def test_an_obstacle_is_named_with_its_remedy(tmp_path: Path) -> None:
    assert PYTHON is not None
    bare = dataclasses.replace(PYTHON, has_compiler=False, compiler="gcc", has_header=False, can_make_venv=False)
    said = Look(State.BLOCKED, obstacles=tuple(control.obstacles_to_build(bare, tmp_path))).obstacle_text
    assert all(word in said for word in ("`gcc`", "Python.h", "python3-dev", "python3-venv"))
    assert control.obstacles_to_build(PYTHON, tmp_path / "not yet/there") == []


@pytest.mark.parametrize("name", ["setup.py", "disagg_kv"])
def test_an_installed_package_is_what_its_wheel_was_built_as(checkout: Path, name: str) -> None:
    path = checkout / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert state(checkout) is State.OFF
    with pytest.raises(MachineError, match="DISAGG_PROXY_COMPILE=1 pip install"):
        control.need(context_of(checkout, PROXY_COMPILED="1"), sys.executable)


def test_a_build_has_every_package_that_the_proxy_imports(tmp_path: Path) -> None:
    for name in identity.SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import disagg_proxy.serve, disagg_proxy.workers.worker_server"
    code += "; print({sys.modules[name].__file__ for name in sys.modules if name.startswith('disagg_')})"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout and str(ROOT) not in done.stdout


def test_it_can_be_switched_off(checkout: Path, compiler: FakeCompiler) -> None:
    (compiler.store.folder / name_of(checkout)).mkdir(parents=True)
    assert state(checkout, PROXY_COMPILED="0") is State.OFF
    server = control.server(context_of(checkout, PROXY_COMPILED="0"), sys.executable)
    assert server == checkout / "disagg_prefill_proxy_server.py"


def test_it_is_needed_and_cannot_be(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MachineError, match="no C compiler `no-such-compiler`"):
        control.need(context_of(checkout, PROXY_COMPILED="1"), sys.executable)


def test_a_bench_begins_no_build_and_ends_one_that_runs(
    checkout: Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "http_get", lambda *_: None)
    program = [sys.executable, "-I", "-S", str(checkout / "disagg_machine/__main__.py")]
    monkeypatch.setattr(Context, "program", lambda _: program)
    assert not control.report(context_of(checkout, BENCH_CHILD="1"), sys.executable)
    assert compiler.pids == []
    context = context_of(checkout)
    context.settings.log_dir.mkdir(parents=True)
    compiler.hold()
    assert control.report(context, sys.executable)
    until(lambda: bool(compiler.pids))
    with pytest.raises(MachineError, match="no proxy answers"):
        bench.cmd_bench(context, ["--once"])
    assert "The build was ended" in capsys.readouterr().err
    assert proc.read_stat(compiler.pids[0]) is None or not proc.group_members(compiler.pids[0])
    assert state(checkout) is State.WANTED


def test_the_compiler_is_here_or_in_the_index(
    checkout: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(checkout)
    assert control.compiler(context, sys.executable) == build.compiler(ROOT)
    shutil.rmtree(compiler.folder)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else str(checkout))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert control.compiler(context, sys.executable) == ""
