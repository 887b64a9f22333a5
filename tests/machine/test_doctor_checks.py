"""Each check of `doctor` on a made-up machine: what it says, and how bad it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from disagg_machine import doctor, messages, proc
from disagg_machine.compiled.control import Look, State
from disagg_machine.context import Context
from disagg_machine.doctor import clocks, hardware, host, running, software
from disagg_machine.doctor.machine import Machine, PythonFacts
from disagg_machine.doctor.verdict import Level, Verdict, error, ok, warning
from disagg_machine.gpus import Gpu
from disagg_machine.messages import MachineError, text
from disagg_machine.parts import ALIVE, DEAD, REUSED, Part
from disagg_machine.proxy_view import Engine, ProxyView
from disagg_machine.readiness import HUNG, LOADING, OK, Readiness
from disagg_machine.settings import load
from disagg_machine.vllm_facts import VllmFacts

OLD = VllmFacts("0.21.0", connector=True, randomises=True, switch=True)
NEW = VllmFacts("0.33.0", randomises=True, switch=True)
ONE_CACHE_GROUP = VllmFacts("0.29.0", randomises=True, switch=True)

Make = Callable[..., Machine]


@pytest.fixture(autouse=True)
def in_english() -> None:
    messages.use("en")


class Fake(Machine):
    """A machine with room for everything, whose facts a test replaces."""

    disk_gib = 500
    taken: frozenset[int] = frozenset()
    states: dict[str, Readiness]

    def free_gib(self, path: Path) -> int:
        return self.disk_gib

    def port_taken(self, port: int) -> bool:
        return port in self.taken

    def readiness(self, part: Part) -> Readiness:
        return self.states.get(part.name, Readiness(OK, "ready"))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(facts: dict[str, Any] | None = None, **environ: str) -> Machine:
        """``facts``: what differs on this machine; ``environ``: settings and other variables."""
        settings = {"RUN_DIR": str(tmp_path / "run"), "MODEL": "org/name", "ENGINE": "vllm", **environ}
        one = Fake(Context(load(settings, tmp_path, tmp_path), tmp_path, settings, "machine"))
        known: dict[str, Any] = {
            "vllm": OLD,
            "compiled": Look(State.READY, folder=tmp_path),
            "gpus": gpus(2),
            "links": matrix("NV18"),
            "peers": matrix("OK"),
            "available_gib": 200,
            "open_files": 65536,
            "shm_mib": 4096,
            "clocks": {"backends": [], "gpus": [], "guard_lives": False, "unreadable": ""},
            "parts": [],
            "view": ProxyView(),
            "states": {},
        }
        for name, value in {**known, **(facts or {})}.items():
            setattr(one, name, value)
        return one

    return build


def gpus(count: int, total: int = 81559, free: int = 81000) -> list[Gpu]:
    return [Gpu(index, f"GPU-{index:04d}", f"Stub {index}", total, free) for index in range(count)]


def matrix(entry: str) -> str:
    return f"\tGPU0\tGPU1\nGPU0\t X \t{entry}\nGPU1\t{entry}\t X \n"


def part(name: str, state: str = ALIVE, **fields: str) -> Part:
    role = name.rstrip("0123456789")
    return Part(name, 4711, state, {"pid": "4711", "role": role, "http": "20003", "since": "1000", **fields})


def keys(verdicts: Iterable[Verdict], *levels: Level) -> list[str]:
    """Keys of what was said, of these levels only where some are given. Every message takes its arguments."""
    found = []
    for verdict in verdicts:
        assert text(verdict.key, *verdict.arguments)
        if not levels or verdict.level in levels:
            found.append(verdict.key)
    return found


# -- software


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ok("doc_packages", "/python")),
        ({"missing": "quart", "venv_ready": True}, ok("doc_packages", "{venv}")),
        ({"missing": "quart"}, warning("doc_packages_later", "quart", "{venv}")),
        (
            {"missing": "quart", "can_make_venv": False, "remedy": "install it"},
            error("doc_no_venv", "quart", "install it"),
        ),
    ],
)
def test_python(make: Make, facts: dict[str, Any], expected: Verdict) -> None:
    machine = make({"python": PythonFacts("/python", "Python 3.12.1", **facts)})
    first, second = software.check_python(machine)
    assert first == ok("doc_python", "/python", "Python 3.12.1")
    venv = machine.settings.venv_dir
    assert second == Verdict(
        expected.level, expected.key, tuple(venv if a == "{venv}" else a for a in expected.arguments)
    )


@pytest.mark.parametrize(
    ("found", "compiler", "expected"),
    [
        (Look(State.OFF), "", ok("doc_compiled_off")),
        (Look(State.READY, folder=Path("/build")), "", ok("doc_compiled", Path("/build"))),
        (Look(State.RUNNING, log="/log"), "", ok("doc_compiling", "/log")),
        (Look(State.FAILED, log="/log"), "", warning("compiled_failed", "/log")),
        (
            Look(State.BLOCKED, obstacles=(("build_compiler", "cc"),)),
            "",
            warning("compiled_blocked", "no C compiler `cc` (Debian: apt-get install gcc)"),
        ),
        (Look(State.WANTED), "mypy[mypyc]==2.4.1", ok("doc_compile_later", "mypy[mypyc]==2.4.1")),
        (Look(State.WANTED), "", warning("doc_compile_index")),
    ],
)
def test_the_compiled_hot_path(make: Make, found: Look, compiler: str, expected: Verdict) -> None:
    verdicts = list(software.check_compiled(make({"compiled": found, "compiler": compiler})))
    assert verdicts == [expected] and keys(verdicts)


@pytest.mark.parametrize(
    ("vllm", "environ", "gpu_count", "expected"),
    [
        (None, {"ENGINE": "sim"}, 2, [ok("doc_sim_asked")]),
        (None, {}, 2, [error("no_vllm")]),
        (None, {"ENGINE": "auto"}, 2, [warning("no_vllm")]),
        (VllmFacts("0.14.0", connector=True, randomises=True), {}, 0, [error("vllm_random_ids", "0.14.0")]),
        (
            VllmFacts("0.14.0", connector=True, randomises=True),
            {"ENGINE": "auto"},
            2,
            [error("vllm_random_ids", "0.14.0")],
        ),
        (VllmFacts("0.8.5"), {"ENGINE": "auto"}, 1, [warning("vllm_too_old", "0.8.5")]),
        (OLD, {}, 2, [ok("doc_vllm", "0.21.0", "P2pNcclConnector", "vllm"), ok("doc_random_set")]),
    ],
)
def test_vllm(
    make: Make, vllm: VllmFacts | None, environ: dict[str, str], gpu_count: int, expected: list[Verdict]
) -> None:
    machine = make({"vllm": vllm, "gpus": gpus(gpu_count)}, **environ)
    assert list(software.check_vllm(machine)) == expected
    assert keys(expected)


def test_vllm_with_this_project_s_connector(make: Make) -> None:
    assert keys(software.check_vllm(make({"vllm": NEW}))) == ["doc_vllm"]
    newer = make({"vllm": VllmFacts("0.34.0")})
    assert keys(software.check_vllm(newer), Level.WARNING) == ["own_untried"]
    reachable = make({"vllm": NEW}, ENGINE_HOST="10.0.0.7")
    assert list(software.check_secret(reachable)) == [warning("doc_no_secret", "10.0.0.7")]
    assert keys(software.check_vllm(make({"vllm": NEW}, ENGINE_HOST="10.0.0.7", DISAGG_KV_SECRET="x"))) == [
        "doc_vllm",
        "doc_secret",
    ]
    for host_name in ("localhost", "127.0.0.5", "::1"):
        assert list(software.check_secret(make({"vllm": NEW}, ENGINE_HOST=host_name))) == []


def test_request_ids(make: Make) -> None:
    kept = VllmFacts("0.11.0", connector=True)
    assert list(software.check_request_ids(make({"vllm": kept}))) == [ok("doc_random_none")]
    for value, expected in (("0", "doc_random_zero"), ("1", "doc_random_set"), ("", "doc_random_set")):
        assert keys(software.check_request_ids(make(VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=value))) == [expected]


def test_chunks_that_can_end_the_prefill_engine(make: Make) -> None:
    risky = make(MAX_NUM_BATCHED_TOKENS="4096", MAX_MODEL_LEN="10000")
    assert list(software.check_vllm(risky))[-1] == warning("chunked_warning", 4096, 10000)


@pytest.mark.parametrize(
    ("lack", "expected"),
    [
        ("", ["doc_model"]),
        ("config.json", ["doc_model_missing"]),
        ("tokenizer.json", ["doc_no_tokenizer"]),
        ("model.safetensors", ["doc_no_weights"]),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sim"])
def test_a_model_folder(make: Make, tmp_path: Path, lack: str, expected: list[str], engine: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if name != lack:
            (folder / name).write_text("{}")
    verdicts = list(software.check_model(make(MODEL=str(folder), ENGINE=engine)))
    assert keys(verdicts) == expected
    bad = Level.ERROR if engine == "vllm" else Level.WARNING
    assert verdicts[0].level is (bad if lack else Level.OK)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ('{"model_type": "qwen3"}', ""),
        ('{"layer_types": ["conv", "attention"]}', "cannot be moved"),
        ('{"layer_types": ["mamba", "attention"]}', "needs vLLM 0.32 or newer"),
        ('{"model_type": "mistral", "sliding_window": 4096}', "--disable-sliding-window"),
        ("[]", ""),
        ("{", ""),
    ],
)
def test_a_model_whose_kv_cannot_be_moved(make: Make, tmp_path: Path, config: str, word: str) -> None:
    """Known before the engines load its weights. vLLM's own connector has other limits."""
    (tmp_path / "config.json").write_text(config)

    def reasons(facts: VllmFacts, **environ: str) -> list[Verdict]:
        verdicts = software.check_model(make({"vllm": facts}, MODEL=str(tmp_path), **environ))
        return [verdict for verdict in verdicts if verdict.key == "model_unsupported"]

    found = reasons(ONE_CACHE_GROUP)
    assert [verdict.level for verdict in found] == ([Level.ERROR] if word else [])
    assert all(word in str(verdict.arguments[1]) for verdict in found)
    assert not reasons(OLD, KV_CONNECTOR="p2p_nccl")
    allowed = reasons(ONE_CACHE_GROUP, EXTRA_PREFILL_ARGS="--enforce-eager --disable-sliding-window")
    assert bool(allowed) is ("layer_types" in config)
    assert bool(reasons(NEW)) is (word == "cannot be moved")


def test_a_model_by_its_name(make: Make, tmp_path: Path) -> None:
    cache = tmp_path / "hf/hub"
    environ = {"HF_HOME": str(tmp_path / "hf")}
    assert keys(software.check_model(make(ENGINE="sim"))) == ["doc_model_unused"]
    assert list(software.check_model(make(**environ))) == [warning("doc_model_download", "org/name", 500, cache)]
    full = make({"disk_gib": 19}, **environ)
    assert list(software.check_model(full)) == [error("doc_model_disk", "org/name", 19, cache)]
    assert list(software.check_model(make(**environ, HF_HUB_OFFLINE="1"))) == [
        error("doc_model_offline", "org/name", cache)
    ]
    snapshot = cache / "models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert list(software.check_model(make(**environ, HF_HUB_OFFLINE="1"))) == [
        ok("doc_model_cached", "org/name", cache)
    ]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/huggingface/hub"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "/hf", "XDG_CACHE_HOME": "/c"}, "/hf/hub"),
        ({"HF_HUB_CACHE": "/hub", "HF_HOME": "/hf"}, "/hub"),
    ],
)
def test_where_downloads_go(environ: dict[str, str], expected: str) -> None:
    assert software.download_cache(environ) == Path(expected)


# -- hardware


def test_gpus(make: Make) -> None:
    assert next(hardware.check_gpus(make({"gpus": gpus(1)}, KV_CONNECTOR="p2p_nccl"))) == error("too_few_gpus", 1)
    assert next(hardware.check_gpus(make({"gpus": gpus(1)}, ALLOW_SHARED_GPU="0"))) == error("too_few_gpus", 1)
    assert list(hardware.check_gpus(make({"gpus": []}, ENGINE="auto"))) == [warning("doc_few_gpus", 0)]
    assert list(hardware.check_gpus(make())) == [
        ok("doc_gpu", 0, "Stub 0", 81000, 81559),
        ok("doc_gpu", 1, "Stub 1", 81000, 81559),
    ]


def test_one_gpu_for_prefill_and_decode(make: Make) -> None:
    one = make({"gpus": gpus(1), "vllm": NEW})
    assert next(hardware.check_gpus(one)) == warning("doc_shared_gpu", "0", 8155)
    assert list(hardware.check_gpu_memory(one)) == [
        ok("doc_gpu_free", 0, 81000, 16311, "prefill"),
        ok("doc_staging", "prefill", 0, 65248, 192 + 1024),
        ok("doc_gpu_free", 0, 81000, 32623, "decode"),
        ok("doc_staging", "decode", 0, 48936, 192 + 1024),
    ]
    busy = make({"gpus": gpus(1, free=20000), "vllm": NEW})
    assert keys(hardware.check_gpu_memory(busy), Level.ERROR) == ["doc_gpu_busy"]


def test_memory_of_gpus_with_vllms_connector(make: Make) -> None:
    assert list(hardware.check_gpu_memory(make())) == [
        ok("doc_gpu_free", 0, 81000, 73403, "prefill"),
        ok("doc_gpu_free", 1, 81000, 57091, "decode"),
        ok("doc_buffer", "decode", 1, 24468, 8653),
    ]
    busy = make({"gpus": gpus(2, free=60000)})
    assert keys(hardware.check_gpu_memory(busy), Level.ERROR) == ["doc_gpu_busy"]
    assert list(hardware.check_gpu_memory(make({"gpus": gpus(2, total=24576, free=24000)})))[-1] == error(
        "doc_buffer_big", "decode", 1, 7373, 8653
    )


def test_memory_of_gpus_with_this_project_s_connector(make: Make) -> None:
    several = make({"vllm": NEW, "gpus": gpus(4)}, PREFILL_GPUS="0,1,2", DECODE_GPUS="3")
    said = list(hardware.check_gpu_memory(several))
    assert said[1] == ok("doc_staging", "prefill1", 0, 8156, 192 + 1024)
    assert said[-2:] == [
        ok("doc_gpu_free", 3, 81000, 73403, "decode"),
        ok("doc_staging", "decode", 3, 8156, 3 * 192 + 1024),
    ]
    tight = make({"vllm": NEW, "gpus": gpus(2, total=8192, free=8192)})
    assert keys(hardware.check_gpu_memory(tight), Level.WARNING) == ["doc_staging_big"] * 2


def test_gpus_that_engines_share_or_that_are_not_there(make: Make) -> None:
    over = make(PREFILL_GPUS="0,0", DECODE_GPUS="1")
    assert list(hardware.check_gpu_memory(over))[1] == error("doc_gpu_over", 0, 180)
    half = make(PREFILL_GPUS="0,0", DECODE_GPUS="1", PREFILL_GPU_MEMORY_UTILIZATION="0.4")
    assert list(hardware.check_gpu_memory(half))[:2] == [
        ok("doc_gpu_free", 0, 81000, 32623, "prefill1"),
        ok("doc_gpu_free", 0, 81000, 65247, "prefill2"),
    ]
    mixed = make(PREFILL_GPU="GPU-0001", DECODE_GPU="1")
    assert "gpu_shared" in keys(hardware.check_gpu_memory(mixed), Level.ERROR)
    missing = make(DECODE_GPU="5")
    assert list(hardware.check_gpu_memory(missing))[-1] == error("no_such_gpu", "5", "decode", "0 1")


def test_a_gpu_whose_engine_runs_is_not_busy(make: Make) -> None:
    machine = make({"gpus": gpus(2, free=100), "parts": [part("prefill"), part("decode")]})
    assert next(hardware.check_gpu_memory(machine)) == ok("part_runs", "prefill", 4711)
    assert keys(hardware.check_gpu_memory(machine), Level.ERROR) == []


@pytest.mark.parametrize(
    ("link", "peer", "expected"),
    [
        ("NV18", "OK", [ok("doc_link_nvlink", "prefill", "decode", "NV18"), ok("doc_peer", "prefill", "decode")]),
        (
            "SYS",
            "CNS",
            [warning("doc_link_pci", "prefill", "decode", "SYS"), warning("doc_no_peer", "prefill", "decode", "CNS")],
        ),
        ("?", "", [warning("doc_link_unknown", "prefill", "decode")]),
    ],
)
def test_links(make: Make, link: str, peer: str, expected: list[Verdict]) -> None:
    machine = make({"links": matrix(link), "peers": matrix(peer) if peer else ""})
    assert list(hardware.check_links(machine)) == expected
    assert keys(expected)


def test_without_gpus_nothing_is_said_of_them(make: Make) -> None:
    for machine in (make({"gpus": []}), make(ENGINE="sim")):
        assert [*hardware.check_gpu_memory(machine), *hardware.check_links(machine)] == []


def test_pinned_memory(make: Make) -> None:
    assert list(hardware.check_pinned_memory(make())) == [ok("doc_pool", 5, 200)]
    wide = make(MEM_POOL_SIZE_GB="5", TENSOR_PARALLEL="2", PREFILL_GPUS="0", DECODE_GPUS="2,4")
    assert list(hardware.check_pinned_memory(wide)) == [ok("doc_pool", 2 * (2 * 8 + 1), 200)]
    assert list(hardware.check_pinned_memory(make({"available_gib": 4}))) == [error("doc_pool_big", 5, 4)]
    for other in (make({"vllm": NEW}), make(ENGINE="sim")):
        assert list(hardware.check_pinned_memory(other)) == []


def test_disk_and_limits(make: Make) -> None:
    machine = make()
    assert list(hardware.check_disk(machine)) == [ok("doc_disk", machine.settings.log_dir, 500)]
    assert keys(hardware.check_disk(make({"disk_gib": 0}))) == ["doc_log_disk"]
    assert list(hardware.check_limits(machine)) == [ok("doc_files", 65536)]
    low = make({"open_files": 1024, "shm_mib": 64}, TENSOR_PARALLEL="2")
    assert list(hardware.check_limits(low)) == [warning("doc_files_low", 1024), warning("doc_shm", 64)]
    assert keys(hardware.check_limits(make({"open_files": None, "shm_mib": 64}))) == ["doc_files"]


def test_limits_of_this_host(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:   7340032 kB\n")
    assert host.available_gib(str(tmp_path / "meminfo")) == 7
    assert host.available_gib(str(tmp_path / "nothing")) == 0
    assert host.shm_mib(str(tmp_path)) > 0 and host.shm_mib(str(tmp_path / "nothing")) == 0
    files = host.open_files()
    assert files is None or files > 0


# -- what runs


def test_ports(make: Make) -> None:
    machine = make({"taken": {20003, 22001}, "parts": [part("prefill")]})
    assert [(v.level, v.key, v.arguments[:2]) for v in running.check_ports(machine)] == [
        (Level.OK, "doc_ports", ("proxy", "10001 30001")),
        (Level.ERROR, "port_taken", (22001, "decode")),
    ]


def test_what_earlier_runs_left(make: Make) -> None:
    machine = make()
    assert list(running.check_run_dir(machine)) == [ok("doc_run_dir", machine.settings.run_dir)]
    left = [
        part("proxy"),
        part("prefill", DEAD),
        part("decode", REUSED, since="9000"),
        part("supervisor", DEAD, pid="0"),
    ]
    assert list(running.check_run_dir(make({"parts": left}), now=4600)) == [
        warning("doc_stale_dead", "prefill", "4711", 60),
        warning("doc_stale_reused", "decode", "4711", -74),
        warning("doc_clock", "decode"),
    ]
    assert keys(running.check_run_dir(make({"parts": left}), now=4600))


def test_what_runs(make: Make, tmp_path: Path) -> None:
    parts = [part("proxy", http="10001"), part("prefill"), part("decode", http="20005")]
    assert list(running.check_running(make({"parts": parts[1:]}))) == []
    assert list(running.check_running(make({"parts": parts}))) == []

    frozen = ProxyView({20005: Engine(3, 7, "frozen", "no token for 41 s", True)}, answered=True)
    machine = make({"parts": parts, "view": frozen, "states": {"prefill": Readiness(HUNG, "does not answer")}})
    assert list(running.check_running(machine)) == [
        error("doc_hung", "prefill", "does not answer", "prefill"),
        error("doc_frozen", "decode", "no token for 41 s", "decode"),
    ]
    assert keys(running.check_running(machine))
    assert list(running.check_running(make({"parts": parts, "view": ProxyView(refused=True)}))) == [
        warning("key_missing", "http://127.0.0.1:10001")
    ]


def test_no_pair_can_serve(make: Make, tmp_path: Path) -> None:
    parts = [part("proxy", http="10001"), part("prefill")]
    states = {"proxy": Readiness(OK, "0 pairs", "no decode")}
    assert list(running.check_running(make({"parts": parts, "states": states}))) == [], "`all` has not finished"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings").write_text("")
    assert list(running.check_running(make({"parts": parts, "states": states}))) == [error("doc_no_pair", "no decode")]
    states["prefill"] = Readiness(LOADING, "loading")
    assert list(running.check_running(make({"parts": parts, "states": states}))) == []
    del states["prefill"]
    stat = proc.read_stat(1)
    assert stat
    (tmp_path / "run/lock").write_text(f"pid=1\nstart={stat.start}\nboot={proc.boot_id()}\ncommand=restart\n")
    assert list(running.check_running(make({"parts": parts, "states": states}))) == [], "another command is at work"


# -- all of it


def test_the_exit_code_and_the_counts(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    machine = make()
    assert doctor.run(machine, [lambda _: [ok("doc_sim_asked"), warning("doc_shm", 3)], lambda _: []]) == 0
    assert doctor.run(machine, [lambda _: [error("no_vllm"), warning("doc_shm", 3), error("no_vllm")]]) == 1
    out, err = capsys.readouterr()
    assert [line.split("]")[0] + "]" for line in out.splitlines()] == [
        "[ok]", "[warning]", "[error]", "[warning]", "[error]",
    ]  # fmt: skip
    assert err.splitlines()[0] == "No errors, 1 warning(s)." and err.endswith("2 error(s), 1 warning(s)\n")


def test_all_checks_on_a_good_machine(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = make({"python": PythonFacts("/python", "Python 3.12.1")}, ENGINE="sim")
    assert doctor.run(machine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(doctor.CHECKS) - 4 and all(line.startswith("[ok] ") for line in lines)


def test_it_takes_no_arguments(make: Make) -> None:
    with pytest.raises(MachineError) as caught:
        doctor.cmd_doctor(make().context, ["--fast"])
    assert caught.value.code == 2


# -- clocks


def gpu_clocks(**fields: Any) -> dict[str, Any]:
    known = {"index": 0, "uuid": "GPU-0", "throttle": [], "sm_mhz": 345, "changed": False}
    return {**known, "lowest_mhz": 345, "highest_mhz": 1980, **fields}


def clocks_of(*found: dict[str, Any], **fields: Any) -> dict[str, Any]:
    known = {"backends": ["sudo"], "gpus": found, "guard": None, "guard_lives": False, "unreadable": ""}
    return {"clocks": {**known, **fields}}


def test_clocks_that_may_be_set(make: Make) -> None:
    found = clocks_of(gpu_clocks(throttle=["gpu_idle"]), gpu_clocks(index=7, uuid="GPU-7", throttle=["sw_power_cap"]))
    assert list(clocks.check_clocks(make(found))) == [
        ok("doc_clocks_may", "sudo"),
        ok("doc_clock_range", 0, 345, 1980, 345),
    ]


def test_clocks_that_may_not_be_set_matter_only_to_one_who_wants_to(make: Make) -> None:
    nobody = clocks_of(backends=[])
    assert list(clocks.check_clocks(make(nobody))) == [ok("doc_clocks_denied")]
    assert list(clocks.check_clocks(make(nobody, DECODE_SM_CLOCK="1410"))) == [warning("doc_clocks_denied")]
    other = make(clocks_of(), DECODE_SM_CLOCK="1410", POWER_BACKEND="zeusd")
    assert list(clocks.check_clocks(other)) == [warning("doc_clocks_denied")]
    assert list(clocks.check_clocks(make(clocks_of(), POWER_BACKEND="none"))) == [ok("doc_clocks_off")]


def test_clocks_that_others_have_set_throttling_and_what_a_killed_guard_has_left(make: Make) -> None:
    one = gpu_clocks(throttle=["applications_clocks_setting", "hw_thermal_slowdown"])
    assert list(clocks.check_clocks(make(clocks_of(one))))[2:] == [
        warning("doc_clock_locked", 0),
        warning("doc_clock_throttled", 0, "hw_thermal_slowdown"),
    ]
    ours = gpu_clocks(throttle=["applications_clocks_setting"], changed=True)
    assert list(clocks.check_clocks(make(clocks_of(ours, guard=4711))))[2:] == [warning("doc_clocks_left", "0")]
    lives = make(clocks_of(ours, guard=4711, guard_lives=True))
    assert list(clocks.check_clocks(lives))[2:] == [ok("doc_clocks_set", "0", 4711)]


def test_clocks_that_cannot_be_read(make: Make) -> None:
    assert list(clocks.check_clocks(make({"clocks": {"error": "no NVML"}}))) == [
        warning("doc_clocks_unreadable", "no NVML")
    ]
    found = clocks_of(gpu_clocks(error="GPU 0: GPU is lost"), unreadable="power.state: what")
    assert list(clocks.check_clocks(make(found))) == [
        warning("doc_clocks_state", "power.state: what"),
        ok("doc_clocks_may", "sudo"),
        warning("doc_clocks_unreadable", "GPU 0: GPU is lost"),
    ]
    assert list(clocks.check_clocks(make({"gpus": []}))) == []
