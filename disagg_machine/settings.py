"""Reading the settings: environment, then the CONFIG file, then what runs now, then the default."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_machine import files, parts, table, ui
from disagg_machine.messages import die, text
from disagg_machine.table import BY_ENV, SETTINGS, WORKED_OUT
from disagg_machine.values import Number

LOCAL_MODELS: Sequence[str] = ("/share-data/wzk-1/model/Qwen3-4B",)
"""Copies of the default model, taken instead of a download where one exists."""

ENVIRONMENT, FILE, RUNNING, DEFAULT = "environment", "file", "running", "default"
"""Where a value comes from; ``source_…`` in the catalogues is how it is shown."""

_SECRETS = "SECRETS"
"""In RUN_DIR/settings: names of the secrets that what runs was started with."""

NOT_REMEMBERED = ("CONFIG", "RUN_DIR", "PYTHON", "VENV_DIR")
"""Settings that say where things are, not what runs."""


@dataclass(frozen=True)
class Settings:
    """The values of one command; the fields are the table's names in lower case.

    Attributes:
        texts: every value as text, by the setting's name; empty where there is none.
        sources: where each one comes from.
    """

    texts: Mapping[str, str]
    sources: Mapping[str, str]
    model: str
    served_model_name: str
    engine: str
    kv_connector: str
    prefill_gpu: str
    decode_gpu: str
    prefill_gpus: str
    decode_gpus: str
    tensor_parallel: int
    prefill_http_port: int
    decode_http_port: int
    prefill_kv_port: int
    decode_kv_port: int
    http_proxy_host: str
    http_proxy_port: int
    proxy_host: str
    proxy_port: int
    engine_host: str
    gpu_memory_utilization: Number | None
    prefill_gpu_memory_utilization: Number
    decode_gpu_memory_utilization: Number | None
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    chunked_prefill: str
    enforce_eager: str
    dtype: str
    kv_buffer_size: Number
    mem_pool_size_gb: int
    extra_prefill_args: str
    extra_decode_args: str
    extra_sim_args: str
    extra_proxy_args: str
    api_key: str
    engine_api_key: str
    disagg_kv_secret: str
    supervise: bool
    restart_limit: int
    restart_window: int
    restart_backoff: Number
    start_timeout: int | None
    stop_timeout: int
    test_timeout: int
    bench_rates: str
    bench_seconds: int | None
    bench_time_limit: int | None
    bench_slo_ttft_ms: Number
    bench_slo_tpot_ms: Number
    bench_slo_attainment: Number
    bench_client: str
    bench_input_len: int
    bench_output_len: int
    bench_requests: int | None
    bench_concurrency: int
    bench_sim_engines: int
    bench_clocks: int
    bench_rounds: int
    extra_plain_args: str
    power_backend: str
    prefill_sm_clock: str
    decode_sm_clock: str
    prefill_mem_clock: str
    decode_mem_clock: str
    prefill_power_limit: Number | None
    decode_power_limit: Number | None
    power_governor: str
    power_take_over: bool
    report_dir: Path
    log_dir: Path
    run_dir: Path
    python: str
    venv_dir: Path
    proxy_compiled: str
    allow_shared_gpu: str
    config: str
    config_file: str

    @property
    def served_names(self) -> list[str]:
        """Names that a client may use; examples show the first."""
        if self.served_model_name:
            return self.served_model_name.split(",")
        last = self.model.rstrip("/").rpartition("/")[2]
        return [last] if last == self.model else [last, self.model]

    def log(self, name: str) -> Path:
        """The log of a part."""
        return self.log_dir / f"{name}.log"


def load(environ: MutableMapping[str, str], root: Path, folder: Path) -> Settings:
    """The settings of one command.

    Args:
        environ: the environment. Names in the CONFIG file that are no settings are added to it, for the programs.
        root: the checkout; folders are beside the script unless a setting says otherwise.
        folder: relative paths are seen from here, where the user stands.

    Raises:
        MachineError: 2, a bad setting or CONFIG file.
    """
    texts = {setting.env: environ.get(setting.env, "") for setting in SETTINGS}
    sources = {name: ENVIRONMENT if value else DEFAULT for name, value in texts.items()}
    if texts["CONFIG"]:
        texts["CONFIG"] = absolute(texts["CONFIG"], folder)
        found, foreign = read_config_file(Path(texts["CONFIG"]))
        _fill(texts, sources, found, FILE)
        for name, value in foreign.items():
            environ.setdefault(name, value)
            ui.say("config_passed_on", name, texts["CONFIG"])
    chosen = sources["RUN_DIR"] != DEFAULT
    texts["RUN_DIR"] = absolute(texts["RUN_DIR"], folder) if chosen else str(root / "run")
    _fill(texts, sources, read_running(Path(texts["RUN_DIR"])), RUNNING)
    _work_out(texts, environ, root, folder, chosen)
    return check(texts, sources)


def _fill(texts: dict[str, str], sources: dict[str, str], found: Mapping[str, str], source: str) -> None:
    for name, value in found.items():
        if name in texts and sources[name] == DEFAULT:
            texts[name], sources[name] = value, source


def absolute(path: str, folder: Path) -> str:
    """A path as seen from ``folder``; ``~/`` is the home folder."""
    if path.startswith("~/"):
        return os.path.join(os.environ.get("HOME", "~"), path[2:])
    return path if path.startswith("/") else f"{folder}/{path}"


_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z_0-9]*)\s*=(.*)", re.ASCII | re.DOTALL)
_QUOTED = re.compile(r"\"(.*)\"(?:\s+#.*)?|'(.*)'(?:\s+#.*)?", re.ASCII | re.DOTALL)


def read_config_file(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """``NAME=value`` lines; ``export`` before and quotes around are allowed, and nothing in the file is run.

    Returns:
        settings, the first value of each, and other variables.

    Raises:
        MachineError: 2, the file cannot be read or a line is not understood.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        raise die(2, "config_unreadable", file) from None
    found: dict[str, str] = {}
    foreign: dict[str, str] = {}
    for number, raw in enumerate(lines, 1):
        line = raw.removesuffix("\r").lstrip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise die(2, "config_bad_line", file, number)
        (found if match[1] in BY_ENV else foreign).setdefault(match[1], unquote(match[2]))
    return found, foreign


def unquote(raw: str) -> str:
    """A value without its quotes, blanks around it and a comment behind it."""
    value = raw.strip()
    quoted = _QUOTED.fullmatch(value)
    if quoted:
        return str(quoted[1] if quoted[1] is not None else quoted[2])
    return re.split(r"\s#", value, maxsplit=1)[0].rstrip()


def read_running(run_dir: Path) -> dict[str, str]:
    """The settings of what runs now, so that other commands speak of it; empty when nothing does."""
    file = run_dir / "settings"
    if not files.is_own(file) or not parts.anything_alive(run_dir):
        return {}
    return files.read_fields(file)


def write_running(settings: Settings) -> None:
    """Remember what runs, for other commands. Of secrets only the names are written to disk."""
    known = {s.env: settings.texts[s.env] for s in SETTINGS if not s.secret and s.env not in NOT_REMEMBERED}
    given = [s.env for s in SETTINGS if s.secret and settings.texts[s.env]]
    files.write_fields(settings.run_dir / "settings", {**known, _SECRETS: " ".join(given)})


def need_secrets(settings: Settings) -> None:
    """For commands that start a part beside others: it must not start without the keys that those have.

    Raises:
        MachineError: 2, what runs was started with a secret that these settings do not have.
    """
    given = read_running(settings.run_dir).get(_SECRETS, "").split()
    missing = [name for name in given if name in BY_ENV and not settings.texts[name]]
    if missing:
        raise die(2, "secret_not_given", ", ".join(missing))


def default_model(copies: Sequence[str] = LOCAL_MODELS) -> str:
    """A copy on this machine, else the name to download."""
    return next((folder for folder in copies if os.path.exists(folder)), BY_ENV["MODEL"].default)


def _work_out(
    texts: dict[str, str], environ: Mapping[str, str], root: Path, folder: Path, run_dir_chosen: bool
) -> None:
    """Defaults, those that depend on others too, and absolute paths."""
    if not texts["MODEL"]:
        texts["MODEL"] = default_model()
    elif os.path.isdir(absolute(texts["MODEL"], folder)):
        texts["MODEL"] = absolute(texts["MODEL"], folder)
    for setting in SETTINGS:
        if not texts[setting.env] and setting.default != WORKED_OUT:
            texts[setting.env] = setting.default
    both = texts["GPU_MEMORY_UTILIZATION"]
    worked_out = {
        **_gpus(texts, environ.get("CUDA_VISIBLE_DEVICES", "")),
        "PREFILL_GPU_MEMORY_UTILIZATION": both or "0.9",
        "DECODE_GPU_MEMORY_UTILIZATION": both,
        "MAX_NUM_BATCHED_TOKENS": _at_least(texts["MAX_MODEL_LEN"], 8192),
        "LOG_DIR": f"{texts['RUN_DIR']}/logs" if run_dir_chosen else str(root / "logs"),
        "REPORT_DIR": str(root / "reports"),
        "VENV_DIR": str(root / ".venv"),
        "PYTHON": "python3",
    }
    for name, value in worked_out.items():
        texts[name] = texts[name] or value
    for name in ("LOG_DIR", "REPORT_DIR", "VENV_DIR"):
        texts[name] = absolute(texts[name], folder)
    if "/" in texts["PYTHON"]:
        texts["PYTHON"] = absolute(texts["PYTHON"], folder)
    if texts["CONFIG_FILE"]:
        texts["CONFIG_FILE"] = absolute(texts["CONFIG_FILE"], folder)


def _gpus(texts: Mapping[str, str], visible: str) -> dict[str, str]:
    """The first GPU for prefill, the next one after its last for decode."""
    listed = visible.split(",") if visible else []
    prefill = texts["PREFILL_GPU"] or (listed[0] if listed else "") or "0"
    if not re.fullmatch(r"[0-9]{1,3}", texts["TENSOR_PARALLEL"], re.ASCII):
        return {"PREFILL_GPU": prefill, "DECODE_GPU": ""}
    width = int(texts["TENSOR_PARALLEL"])
    decode = listed[width] if len(listed) > width else ""
    if not decode:
        decode = str(int(prefill) + width) if re.fullmatch(r"[0-9]+", prefill, re.ASCII) else "1"
    return {"PREFILL_GPU": prefill, "DECODE_GPU": decode}


def _at_least(raw: str, least: int) -> str:
    return str(max(int(raw), least)) if re.fullmatch(r"[0-9]{1,9}", raw, re.ASCII) else ""


_EMPTY: dict[object, object] = {}


def check(texts: Mapping[str, str], sources: Mapping[str, str]) -> Settings:
    """The values of these texts.

    Raises:
        MachineError: 2, naming the setting and what would be right.
    """
    read: dict[str, Any] = {}
    for setting in SETTINGS:
        value = texts[setting.env]
        if "\n" in value:
            raise die(2, "bad_setting", setting.env, "...", text("want_one_line"))
        try:
            read[setting.name] = setting.read(value) if value else _nothing(setting)
        except ValueError as error:
            raise die(2, "bad_setting", setting.env, value, error) from None
    for name in ("report_dir", "log_dir", "run_dir", "venv_dir"):
        read[name] = Path(read[name])
    return Settings(texts=dict(texts), sources=dict(sources), **read)


def _nothing(setting: table.Setting) -> object:
    """The value of a setting that is not given: the empty text, None for a number."""
    from disagg_machine import values

    return None if setting.read in (values.port, values.count, values.number, values.fraction, values.flag) else ""
