"""Every command, setting, route, metric and module that a document names exists; routes and settings also vice versa.

A name counts when it stands as code: between backquotes or in a code block. What belongs to others is in a list here.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from disagg_machine import table
from disagg_machine.cli import COMMANDS
from disagg_proxy.config import Config
from disagg_proxy.config.table import SETTINGS
from disagg_proxy.server.asgi import create_app
from disagg_proxy.server.asgi.engine_routes import NOT_SERVED
from disagg_proxy.services import Services
from tests.conftest import LOCAL
from tests.telemetry.metrics import listed
from tools.settings_tables import ROOT, SETTINGS_PAGES

DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [*DOCS, *sorted((ROOT / "deploy").glob("**/*.md"))]
SCRIPT = ROOT / "test_single_machine.sh"

OTHERS_SETTINGS = re.compile(
    r"(VLLM|LITELLM|ZEUSD|CUDA|HF|NCCL|OTEL|PIP|OMP|PYTHON|TRANSFORMERS|GPU_TEST)_\w+|GPU_RESULTS|OPENAI_API_KEY|PYTHONPATH|NO_COLOR|POWER_SIMULATED"
)
"""Of vLLM, CUDA, libraries, the tests and simulated GPUs."""

OTHERS_WORDS = {
    "POWER_SIMULATED_PRIVILEGED",
    "PUT_ASYNC",
    "SO_REUSEPORT",
    "MAX_CONTENT_LENGTH",
    "DISAGG_KV_TRACE",
    "DISAGG_PROXY_COMPILE",
}
"""In capitals, and no settings: of vLLM's connector, of the kernel, of Quart; where the connector writes its times;
what setup.py builds; simulated GPUs."""

OTHERS_ROUTES = {
    "/abort_requests", "/collective_rpc", "/generative_scoring", "/inference/v1/generate", "/invocations", "/pause",
    "/sleep", "/tokenizer_info", "/v1/chat/completions/batch",
}  # fmt: skip
"""Of vLLM, and not to be had here."""

PREFIXES = {"/v1", "/admin"}
FILES = re.compile(r"/(proc|dev|sys|share-data|path|tmp|etc)(/.*)?")


def code(page: Path) -> list[str]:
    """Everything in a page that stands as code, a line each."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline


def script_settings() -> set[str]:
    return {setting.env for setting in table.SETTINGS}


def commands() -> dict[str, set[str]]:
    """The script's commands and their flags."""
    return {name: set(re.findall(r"-{1,2}[\w-]+", one.arguments)) for name, one in COMMANDS.items()}


def names(pages: list[Path] = PAGES) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("page", names())
def test_settings(page: Path) -> None:
    known = {setting.env for setting in SETTINGS} | script_settings() | OTHERS_WORDS
    found = set()
    for line in code(page):
        found |= set(re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]{2,})=", line))  # NAME=value before a command
        found |= set(re.findall(r"^([A-Z][A-Z0-9]*_[A-Z0-9_]+)$", line))  # a name by itself
    assert {name for name in found - known if not OTHERS_SETTINGS.fullmatch(name)} == set()


@pytest.mark.parametrize("page", SETTINGS_PAGES.values(), ids=SETTINGS_PAGES)
def test_every_setting_is_in_both_languages(page: Path) -> None:
    rows = set(re.findall(r"^\| `([A-Z][A-Z0-9_]+)`", page.read_text(encoding="utf-8"), re.M))
    assert {setting.env for setting in SETTINGS} | script_settings() == rows


@pytest.mark.parametrize("page", names())
def test_commands_of_the_script(page: Path) -> None:
    known = commands()
    for line in code(page):
        for call in re.findall(r"test_single_machine\.sh([^&|;#()<>\n]*)", line):
            if not call.startswith(" "):
                continue
            words = [word for word in call.split() if not word.startswith("$")]
            if words and words[0] != "COMMAND":
                assert words[0] in known, call
                flags = {word for word in words[1:] if re.match(r"--?[a-z]", word)}
                assert flags <= known[words[0]], call


@pytest.mark.parametrize("page", names())
def test_modules_that_are_run(page: Path) -> None:
    for line in code(page):
        for module in re.findall(r"python[\d.]* -m ([\w.]+)", line):
            if module.split(".")[0] in {path.parent.name for path in ROOT.glob("*/__init__.py")}:
                found = importlib.util.find_spec(module)
                assert found is not None, module
                if found.submodule_search_locations is not None:
                    assert importlib.util.find_spec(f"{module}.__main__") is not None, f"{module} cannot be run"


@pytest.mark.parametrize("page", names())
def test_requirements_that_are_installed(page: Path) -> None:
    for line in code(page):
        for name in re.findall(r"-r (\S+\.txt)\b", line):
            assert (ROOT / name).exists(), name


async def routes() -> set[str]:
    """What the proxy serves; NAME and PATH stand for what varies."""
    services = Services(Config(**LOCAL, admin_key="k"))
    try:
        app = create_app(services.config, services)
        return {re.sub(r"<[^>]+>", "NAME", rule.rule) for rule in app.url_map.iter_rules()}
    finally:
        services.discovery.listener.stop()


async def test_routes_that_are_named_exist() -> None:
    known = [re.compile(rule.replace("NAME", "[^/]+")) for rule in await routes()]
    for page in PAGES:
        for line in code(page):
            for alone, asked in re.findall(r"^(?:(?:GET|POST) )?(/[a-z_][\w/]*)$|127\.0\.0\.1:10001(/[\w/]*)", line):
                path = (alone or asked).rstrip("/")
                if path and path not in OTHERS_ROUTES | PREFIXES and not FILES.fullmatch(path):
                    assert any(rule.fullmatch(path) for rule in known), f"{page.name}: {path}"


@pytest.mark.parametrize("page", ["api.md", "api.zh-CN.md"])
async def test_every_route_is_in_both_languages(page: str) -> None:
    """One below a route that is named, as the parts of a page, need not be."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.search(r"\n## (?:Routes|路径)\n(.*?)\n## ", text, re.S)
    assert section is not None
    table = "\n".join(line.split("|")[1] for line in section[1].splitlines() if line.startswith("| `"))
    named = set(re.findall(r"(?<=[` ])(/[\w/]*)", table))
    below = tuple(f"{name}/" for name in named if name != "/")
    missing = {name for name in await routes() - named - set(NOT_SERVED) if not name.startswith(below)}
    assert missing == set()


@pytest.mark.parametrize("page", names())
def test_metrics(page: Path) -> None:
    """docs/monitoring.md lists them all, and is held against /metrics in tests/telemetry."""
    text = page.read_text(encoding="utf-8")
    named = {
        re.sub(r"_(?:bucket|sum|count)$", "", name)
        for name in re.findall(r"\bdisagg_proxy_\w*[a-z0-9]\b(?!\.py)", text)
    }
    assert named - set(listed()) == set()


def test_shell_words_in_code_blocks_can_be_pasted() -> None:
    """Quotes of every line that begins with this script or a setting close."""
    for page in DOCS:
        for line in code(page):
            if re.match(r"([A-Z_]+=\S+ )*\./test_single_machine\.sh", line):
                shlex.split(line, comments=True)
