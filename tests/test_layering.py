"""Who may import whom, at run time and for types, and where single libraries may be used.

A unit is a folder of a package or a module at its top. Imports are read from the source, so nothing is executed; those
inside functions count as run time, those under ``if TYPE_CHECKING:`` are for types. Every entry of a table must be
needed: one that no import uses any more fails here and is to be removed.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("disagg_proxy", "disagg_kv", "disagg_sim", "disagg_report", "disagg_machine", "disagg_power", "disagg_ray")

MAY_IMPORT = {
    # The KV connector, which vLLM loads: it must work where the proxy is not installed.
    "disagg_kv.within": "",
    "disagg_kv.trace": "",
    "disagg_kv.tally": "",
    "disagg_kv.protocol": "",
    "disagg_kv.secret": "",
    "disagg_kv.ports": "",
    "disagg_kv.settings": "disagg_kv.ports disagg_kv.protocol disagg_kv.secret",
    "disagg_kv.model_config": "",
    "disagg_kv.outcomes": "",
    "disagg_kv.control": "disagg_kv.protocol disagg_kv.within",
    "disagg_kv.transport": "disagg_kv.protocol disagg_kv.settings disagg_kv.trace",
    "disagg_kv.prefill": "disagg_kv.protocol disagg_kv.tally disagg_kv.transport",
    "disagg_kv.decode": "disagg_kv.protocol disagg_kv.transport",
    "disagg_kv.engine": "disagg_kv.ports disagg_kv.protocol disagg_kv.settings disagg_kv.tally disagg_kv.trace "
    "disagg_kv.transport disagg_kv.prefill disagg_kv.decode disagg_kv.model_config disagg_kv.outcomes",
    "disagg_kv.connector": "disagg_kv.settings disagg_kv.engine",
    # Power, energy and clocks of GPUs, real or simulated.
    "disagg_power": "",
    # The proxy. Helpers that know nothing of it:
    "errors": "",
    "address": "",
    "runtime": "",
    "config": "address disagg_kv.secret",
    # Instances, and the text of requests:
    "request_id": "address",
    "http1": "request_id",
    "openai": "errors",
    "cluster": "address config errors",
    "telemetry": "cluster config disagg_power errors http1 runtime",
    "placement": "cluster telemetry",
    "admission": "cluster errors openai telemetry",
    "upstream": "address cluster disagg_kv.control disagg_kv.protocol errors http1 runtime",
    "health": "cluster errors runtime upstream",
    # One request:
    "downstream": "cluster errors http1 openai request_id runtime telemetry upstream",
    "connectors": "address admission cluster config downstream errors http1 openai request_id runtime telemetry "
    "upstream",
    "keys": "admission config telemetry",
    "coordinator": "admission cluster config connectors downstream errors http1 openai telemetry",
    # All of it together, and what serves it:
    "discovery": "address cluster config connectors disagg_kv.control disagg_kv.protocol disagg_power health http1 "
    "telemetry upstream",
    "peer_group": "admission cluster discovery health placement telemetry",
    "services": "admission cluster config connectors coordinator disagg_power discovery health keys openai peer_group "
    "placement runtime telemetry upstream",
    "page": "errors runtime",
    "server": "address admission cluster config coordinator discovery downstream errors http1 keys openai page runtime "
    "services telemetry upstream",
    "workers": "address cluster config discovery health peer_group placement runtime server services telemetry",
    "top": "page",
    "serve": "config connectors discovery server services telemetry workers",
    "check": "config connectors",
    "cli": "config serve",
    "__main__": "cli",
    # Reports of the benchmarks are made without the proxy; the load client is in there.
    "disagg_report": "disagg_power",
    # Simulated engines know the KV connector and not the proxy; a chaos run starts both.
    "disagg_sim": "disagg_kv disagg_kv.decode disagg_kv.outcomes disagg_kv.prefill disagg_kv.protocol disagg_kv.secret "
    "disagg_kv.within disagg_power",
    "disagg_sim.chaos": "cluster config disagg_power disagg_report disagg_sim runtime server services",
    # Their former names as commands.
    "sim": "disagg_sim",
    "chaos": "disagg_sim.chaos",
    # The machine starts the others as processes, and knows their command lines and which models the connector refuses.
    "disagg_machine": "disagg_kv.model_config",
    # The cluster takes the machine's command lines, and the names of both tables of settings.
    "disagg_ray": "config disagg_kv.ports disagg_kv.protocol disagg_kv.secret disagg_machine disagg_proxy",
}
"""Unit -> units that it may import at run time, from the bottom up: each names only units above it. The units of
disagg_proxy have no prefix; disagg_report, disagg_machine, disagg_power and disagg_ray are one unit each, disagg_sim
another one without its ``chaos``. A package's own ``__init__`` may be imported by all of it."""

FOR_TYPES = {
    # The transports move the tensors of vLLM's cache, whose layout stands with the rest that is read from vLLM.
    "disagg_kv.transport": "disagg_kv.engine",
}
"""The same for types, besides what is allowed at run time."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Imports that break these rules for now: (importing module, imported module) -> the reason."""

LIBRARIES = {
    # The application's framework; everything else handles plain values.
    "quart": "server.asgi",
    "quart_cors": "server.asgi.auth",
    "werkzeug": "server.asgi.error_responses",
    # The server on the client's side, and the parser of both sides and of the load client.
    "uvicorn": "server.closing_cycle server.connection_lifecycle server.http_server workers.worker_server",
    "httptools": "server.client_connection upstream.connection disagg_report.load_client",
    # The registration port; the simulator and the connector are its clients.
    "zmq": "discovery.forward discovery.listener disagg_sim.ping disagg_kv.engine.announce",
    # Registrations, whose format is vLLM's, and three formats between the workers of one proxy.
    "msgpack": "discovery.announcement telemetry.aggregate telemetry.page_state workers.channel disagg_sim.kv_wire "
    "disagg_sim.ping",
    # The proxy's own HTTP client (upstream) is not aiohttp.
    "aiohttp": "disagg_sim top.follow",
    # disagg_ray.scaling reads what the proxies' /metrics say.
    "prometheus_client": "disagg_ray.scaling server.asgi.status_routes telemetry.clock_status telemetry.energy_metrics "
    "telemetry.metrics",
    # config.values: whether it is installed.
    "opentelemetry": "config.values telemetry.tracing",
    "ray": "disagg_ray.app disagg_ray.cli disagg_ray.serve_llm disagg_ray.service disagg_ray.store",
    "yaml": "disagg_ray.settings",
    "rich": "top",
    "matplotlib": "disagg_power.record_plot disagg_report.plots",
    "vllm": "disagg_kv.connector disagg_kv.engine.metrics disagg_kv.engine.versions disagg_kv.transport.nccl",
    "torch": "disagg_kv.connector disagg_kv.engine disagg_kv.transport.cuda_memory disagg_kv.transport.nccl "
    "disagg_kv.transport.tcp",
    # Sockets for clients (serve, server, workers), between workers (workers), for registrations (discovery); those to
    # instances are asyncio's. The machine asks with the standard library alone.
    "socket": "check serve server workers discovery.allow discovery.listener disagg_sim disagg_kv.ports "
    "disagg_kv.prefill.server disagg_kv.transport.channel disagg_machine.net disagg_power.backends disagg_ray.claims",
    "threading": "discovery.listener discovery.mailbox telemetry.access_log telemetry.tracing workers.shared_load "
    "disagg_kv disagg_power.hold disagg_power.reader disagg_report.power disagg_machine.bench.load",
}
"""Library -> modules or folders that may import it."""

WITHOUT_IO = (
    "cluster", "http1", "openai", "placement.elastic", "placement.fit", "placement.goals", "placement.pace",
    "placement.roles", "placement.roles_figures", "placement.trust", "telemetry.stats", "errors", "address",
    "request_id",
)  # fmt: skip
IO = {"aiohttp", "asyncio", "os", "select", "socket", "subprocess", "threading", "time", "urllib", "zmq"}
"""Units that decide without I/O and without a clock of their own, and the modules that would give them either."""

REQUEST_ID = ("___prefill_addr_", "___decode_addr_")
KNOW_REQUEST_ID = {
    "request_id": "writes it",
    "disagg_sim.request": "reads it, as vLLM's connector does",
    "disagg_sim.connectors.moriio": "reads it, as vLLM's connector does",
    "disagg_sim.chaos.engines": "checks what the engines got",
}
"""The addresses in the request id of P2pNcclConnector, and the modules that spell them."""

QUART_REQUEST = (
    "server.asgi.admin_routes server.asgi.auth server.asgi.engine_routes server.asgi.generation_routes "
    "server.asgi.page_routes server.asgi.request"
)
"""Modules that read Quart's current request."""


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports_of(source: str) -> tuple[set[str], set[str]]:
    """Full names of what a module imports, at run time and for types; ``from a import b`` is ``a.b``."""
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: tuple[set[str], set[str]] = (set(), set())
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
        found[id(node) in guarded].update(names)
    return found


IMPORTS = {name: imports_of(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def module_of(name: str) -> str:
    """The module that ``name`` is, or is taken from."""
    return name if name in MODULES else name.rpartition(".")[0]


def edges(for_types: bool) -> Iterator[tuple[str, str]]:
    """Module -> module within the project."""
    for name, imported in IMPORTS.items():
        for other in {module_of(i) for i in imported[for_types] if i.partition(".")[0] in PACKAGES}:
            assert other in MODULES, f"{name} imports {other}, which is not there"
            if other != name:
                yield name, other


def unit(module: str) -> str:
    package, _, rest = module.partition(".")
    if not rest or package in ("disagg_report", "disagg_machine", "disagg_power", "disagg_ray"):
        return package
    top = rest.partition(".")[0]
    if package == "disagg_sim":
        return "disagg_sim.chaos" if top == "chaos" else package
    return top if package == "disagg_proxy" else f"{package}.{top}"


def between_units(for_types: bool) -> dict[tuple[str, str], set[tuple[str, str]]]:
    """Unit -> unit, with the imports that make it so; without those of a package's own ``__init__``, and exceptions."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for module, other in edges(for_types):
        own = other == module.partition(".")[0]
        if unit(module) != unit(other) and not own and (module, other) not in EXCEPTIONS:
            found[unit(module), unit(other)].add((module, other))
    return found


def pairs(table: dict[str, str]) -> set[tuple[str, str]]:
    return {(name, other) for name, others in table.items() for other in others.split()}


def cycle(graph: set[tuple[str, str]]) -> list[str]:
    """One circle, empty when there is none."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name, other in graph:
        sorter.add(name, other)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def within(module: str, place: str) -> bool:
    """Whether ``module`` is ``place`` or below it; places of disagg_proxy have no prefix."""
    full = place if place.partition(".")[0] in PACKAGES else f"disagg_proxy.{place}"
    return module == full or module.startswith(full + ".")


# -- the tables


def test_each_unit_stands_in_the_table_below_what_it_imports() -> None:
    packages = {unit(module) for module in MODULES} - {"disagg_proxy", "disagg_kv"}
    assert set(MAY_IMPORT) == packages, "every folder and module at the top has a line"
    seen = {"disagg_proxy", "disagg_kv"}
    for name, others in MAY_IMPORT.items():
        assert seen >= set(others.split()), f"{name} may import what stands below it"
        seen.add(name)


@pytest.mark.parametrize("for_types", [False, True], ids=["run_time", "types"])
def test_imports_are_allowed(for_types: bool) -> None:
    allowed = pairs(MAY_IMPORT) | (pairs(FOR_TYPES) if for_types else set())
    wrong = {f"{a} -> {b}": found for (a, b), found in between_units(for_types).items() if (a, b) not in allowed}
    assert not wrong


def test_what_is_allowed_is_needed() -> None:
    assert pairs(MAY_IMPORT) - between_units(False).keys() == set(), "remove it from MAY_IMPORT"
    assert pairs(FOR_TYPES) - between_units(True).keys() == set(), "remove it from FOR_TYPES"
    assert not pairs(FOR_TYPES) & pairs(MAY_IMPORT)


def test_exceptions_are_needed_and_have_a_reason() -> None:
    allowed = pairs(MAY_IMPORT)
    for module, other in EXCEPTIONS:
        assert EXCEPTIONS[module, other], (module, other)
        assert (module, other) in {*edges(False), *edges(True)}, f"{module} does not import {other} any more"
        assert (unit(module), unit(other)) not in allowed


# -- circles


def test_no_folders_import_each_other() -> None:
    assert cycle({(unit(a), unit(b)) for a, b in edges(False) if unit(a) != unit(b)}) == []


def test_no_modules_import_each_other() -> None:
    assert cycle(set(edges(False))) == []


def test_the_machine_needs_only_the_standard_library() -> None:
    """Its commands work in any Python, also where the virtual environment is missing or broken."""
    for module, imported in IMPORTS.items():
        if module.partition(".")[0] == "disagg_machine":
            roots = {name.partition(".")[0] for name in set().union(*imported)}
            assert roots - sys.stdlib_module_names - {"disagg_machine", "disagg_kv"} == set(), module


def test_the_packages_need_none_of_the_tools() -> None:
    tools = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in PACKAGES}
    assert {"tests", "bench", "fuzz", "tools"} <= tools
    for module, (run_time, types) in IMPORTS.items():
        assert not {name.partition(".")[0] for name in run_time | types} & tools, module


# -- libraries and text


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_used_where_it_belongs(library: str) -> None:
    users = {
        m for m, imported in IMPORTS.items() if any(i.partition(".")[0] == library for i in set().union(*imported))
    }
    places = LIBRARIES[library].split()
    assert {user for user in users if not any(within(user, place) for place in places)} == set()
    assert {place for place in places if not any(within(user, place) for user in users)} == set(), "not needed any more"


def test_the_current_request_is_read_in_few_modules_of_the_application() -> None:
    users = {m.removeprefix("disagg_proxy.") for m, (run_time, _) in IMPORTS.items() if "quart.request" in run_time}
    assert users == set(QUART_REQUEST.split())


@pytest.mark.parametrize("name", WITHOUT_IO)
def test_decisions_are_made_without_io_and_clock(name: str) -> None:
    for module, (run_time, _) in IMPORTS.items():
        if within(module, name):
            assert not {i.partition(".")[0] for i in run_time} & IO, module


def test_the_addresses_in_request_ids_are_spelt_in_one_module_of_the_proxy() -> None:
    users = {
        name.removeprefix("disagg_proxy.")
        for name, path in MODULES.items()
        if any(marker in path.read_text(encoding="utf-8") for marker in REQUEST_ID)
    }
    assert users == set(KNOW_REQUEST_ID)


def test_only_simulated_engines_know_how_long_their_steps_take() -> None:
    """The placement (docs/elastic.md) learns the pace of engines from their answers, never from the step model."""
    step_model = "disagg_sim.step_model"
    users = {module for module, found in IMPORTS.items() if any(within(i, step_model) for i in set().union(*found))}
    assert users and {unit(user) for user in users} == {"disagg_sim"}
    assert "disagg_sim" not in MAY_IMPORT["placement"] and within("disagg_proxy.placement.elastic", "placement")


# -- the reader of imports


def test_imports_are_read_as_python_means_them() -> None:
    run_time, types = imports_of(
        "import a.b, c\nfrom d.e import f as g\nif TYPE_CHECKING:\n    from h import i\nelse:\n    import j\n"
        "def late():\n    if typing.TYPE_CHECKING:\n        import k\n    from l import m\n"
    )
    assert run_time == {"a.b", "c", "d.e.f", "j", "l.m"} and types == {"h.i", "k"}
    assert (
        module_of("disagg_proxy.server.http_server.listen")
        == "disagg_proxy.server.http_server"
        == module_of("disagg_proxy.server.http_server")
    )
    assert unit("disagg_proxy.cli") == "cli" and unit("disagg_proxy.server.asgi.app") == "server"
    assert unit("disagg_kv.engine.plan") == "disagg_kv.engine" and unit("disagg_report.cli") == "disagg_report"
    assert unit("disagg_sim.engine") == "disagg_sim" and unit("disagg_sim.chaos.run") == "disagg_sim.chaos"


def test_a_circle_is_found() -> None:
    assert cycle({("a", "b"), ("b", "c")}) == []
    assert set(cycle({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")})) == {"a", "b", "c"}
