"""/metrics: its samples, that the docs list all of them, and that dashboard and rules query nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from disagg_power import status_file
from disagg_power.status_file import Status
from disagg_proxy.cluster.circuit_breaker import FAILURES_TO_OPEN
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.clock_status import ClockStatus
from disagg_proxy.telemetry.metrics import metrics_registry
from disagg_proxy.telemetry.request_recorder import _MAX_MODELS
from disagg_proxy.telemetry.stats import Histogram
from tests.power.figures import count_energy
from tests.simulated import REQUESTS
from tests.telemetry.metrics import DASHBOARD, PAGE, RULES, described, expressions, listed, named_in
from tests.test_docs import PAGES

PATH = "/v1/completions"
RENAMED = {
    "kv_releases_total": "drains_total",
    "kv_releases_waiting": "drains_waiting",
    "kv_released_tokens_total": "drained_tokens_total",
    "instance_kv_releases_total": "instance_drains_total",
    "instance_kv_releases_failed_total": "instance_drains_failed_total",
}
"""New name -> the deprecated one, which has the same samples for one release."""

ASK = REQUESTS[PATH]

LATER = 1e12
"""Time of a reading that the proxy keeps."""


async def scrape(machine) -> dict[tuple[str, frozenset], float]:
    """Samples by name, without its beginning, and labels."""
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        text = await answer.text()
    return {
        (sample.name.removeprefix("disagg_proxy_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(found, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


async def test_requests_by_route_model_outcome_and_cause(machine, pair) -> None:
    for path, body in REQUESTS.items():
        await machine.stream(path, body)
    await machine.post(PATH, {"prompt": "x"})
    await machine.post(PATH, {**ASK, "model": "nobody"})
    await machine.post(PATH, {"prompt": 1, "model": 2})
    await machine.proxy.until_idle()
    found = await scrape(machine)
    for path in REQUESTS:
        count = 1 + (path == PATH)
        assert at(found, "requests_total", route=path, model="sim-model", outcome="ok", cause="") == count
    error = {"route": PATH, "outcome": "client_error"}
    assert at(found, "requests_total", **error, model="other", cause="model_not_found") == 1
    assert at(found, "requests_total", **error, model="unknown", cause="invalid_request") == 1
    assert sum(value for (name, _), value in found.items() if name == "requests_total") == 6


def test_clients_cannot_make_labels(desk) -> None:
    desk.recorder.served = lambda model: True
    for number in range(_MAX_MODELS + 10):
        record = desk.recorder.open(PATH, None)
        record.on_ready(f"m{number}")
        record.end()
    assert len(desk.recorder.stats.labelled) == _MAX_MODELS + 1
    assert desk.recorder.stats.labelled[f"{PATH}\tclient_left\tin_queue\tother"] == 10


async def test_times_and_tokens(machine, pair) -> None:
    await machine.stream(PATH, {**ASK, "max_tokens": 40, "stream_options": {"include_usage": True}})
    await machine.post(PATH, ASK)
    await machine.proxy.until_idle()
    found = await scrape(machine)
    assert at(found, "time_to_first_token_seconds_count") == 1, "of streams only"
    assert at(found, "e2e_request_latency_seconds_count") == at(found, "request_prefill_time_seconds_count") == 2
    assert 0 < at(found, "time_to_first_token_seconds_sum") < at(found, "e2e_request_latency_seconds_sum") < 20
    assert at(found, "inter_token_latency_seconds_count") >= 1
    assert at(found, "generation_tokens_total") == at(found, "request_generation_tokens_sum") == 48
    assert at(found, "request_generation_tokens_bucket", le="10.0") == 1
    assert at(found, "prompt_tokens_total") == at(found, "request_prompt_tokens_sum") > 0
    assert at(found, "stream_pieces_total") > 1


async def test_instances(machine, pair) -> None:
    _, decode = pair
    await machine.post(PATH, {"prompt": "x", "max_tokens": 1, "prompt_logprobs": 1})
    await machine.unharmed(*pair)
    where = {"role": "decode", "address": decode.http_address}
    instance = machine.proxy.instance(decode.http_address)
    found = await scrape(machine)
    states = {
        state: at(found, "instance_state", **where, state=state) for state in ("probing", "ready", "frozen", "lost")
    }
    assert states == {"probing": 0, "ready": 1, "frozen": 0, "lost": 0}
    assert at(found, "instance_kv_releases_total", **where) == 1
    assert at(found, "instance_kv_releases_failed_total", **where) == 0
    assert at(found, "kv_releases_total", result="done") == 1 and at(found, "kv_released_tokens_total") > 0
    for new, old in RENAMED.items():
        assert {labels: value for (name, labels), value in found.items() if name == old} == {
            labels: value for (name, labels), value in found.items() if name == new
        }
    assert at(found, "instance_ping_age_seconds", **where) < 3 and at(found, "instance_pings_missed", **where) == 0
    assert at(found, "pairs_ready") == 1 and at(found, "instance_breaker", **where, state="closed") == 1
    registry = machine.proxy.services.registry
    assert at(found, "instance_suspect", **where) == at(found, "instance_busy", **where) == 0
    registry.rejected(instance)
    registry.suspect(instance, True)
    found = await scrape(machine)
    assert at(found, "instance_busy", **where) == at(found, "instance_rejections_total", **where) == 1
    assert at(found, "instance_suspect", **where) == 1 and at(found, "pairs_ready") == 0
    instance.last_ping = registry.now() - 7
    for _ in range(FAILURES_TO_OPEN):
        Lease(registry, instance, 100).end(failed=True)
    Lease(registry, instance, 100)
    instance.kv_waiting_tokens = 5000
    registry.process_ended(instance)
    for _ in range(FAILURES_TO_OPEN):
        Lease(registry, instance).end(failed=True)
    found = await scrape(machine)
    assert at(found, "instance_pings_missed", **where) == 2 and at(found, "instance_kv_waiting_tokens", **where) == 5000
    assert at(found, "instance_tokens_in_flight", **where) == 100 and at(found, "instance_restarts_total", **where) == 1
    assert at(found, "instance_breaker", **where, state="open") == 1
    assert at(found, "pairs_ready") == 0


async def test_the_load_that_an_engine_shows(machine, pair) -> None:
    _, decode = pair
    instance = machine.proxy.instance(decode.http_address)
    where = {"role": "decode", "address": decode.http_address}
    names = ("engine_requests_running", "engine_requests_waiting", "kv_cache_usage_ratio", "kv_cache_capacity_tokens")
    instance.engine_load = EngineLoad(LATER, 12, 3, 0.25, 4096, 7)
    found = await scrape(machine)
    assert [at(found, f"instance_{name}", **where) for name in names] == [12, 3, 0.25, 4096]
    assert at(found, "instance_kv_dropped_prompts_total", **where) == 7
    instance.engine_load = EngineLoad(LATER, running=12)
    found = await scrape(machine)
    assert at(found, "instance_engine_requests_running", **where) == 12
    assert not {name for name, _ in found} & {f"instance_{name}" for name in names[1:]}, "unknown, not 0"


def test_bucket_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 7):
        histogram.add(value)
    assert (histogram.buckets, histogram.sum) == ([2, 1, 1, 1], 15)


async def test_every_metric_is_listed_and_every_listed_one_exists(machine, pair, tmp_path) -> None:
    await machine.stream(PATH, ASK)
    await machine.proxy.until_idle()
    services = machine.proxy.services
    stats = services.stats
    keys = {"a\tok": stats.key_requests, "a\tprompt": stats.key_tokens, "a\ttokens": stats.key_refusals}
    for labels, counts in keys.items():
        counts[labels] += 1
    status_file.write(tmp_path / "status", Status(os.getpid(), "set", clocks_mhz={"prefill": 990}))
    services.clock_status = ClockStatus(str(tmp_path / "status"))
    services.clock_status.poll()
    for engine in pair:
        machine.proxy.instance(engine.http_address).engine_load = EngineLoad(LATER, 1, 0, 0.5, 16, 0)
    alone = await services.overview()
    count_energy(services.energy, services.registry.now())
    workers = [{"pid": os.getpid(), "responding": True}, {"pid": None, "responding": False}]
    several = Overview(
        alone.stats, alone.registrations, alone.refused, 0, 0, alone.instances, alone.seen, alone.gauges,
        workers=workers,
    )  # fmt: skip
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for overview in (alone, several):
        families = text_string_to_metric_families(generate_latest(metrics_registry(services, overview)).decode())
        for name, (kind, labels) in described(families).items():
            assert name not in found or found[name][0] == kind
            found[name] = (kind, labels | found.get(name, (kind, frozenset()))[1])
    assert listed() == found


@pytest.mark.parametrize("where", expressions())
def test_dashboard_and_rules_query_existing_metrics_only(where: str) -> None:
    there = listed()
    expression = expressions()[where]
    named = named_in(expression)
    assert not named & {f"disagg_proxy_{old}" for old in RENAMED.values()}
    assert named <= set(there) and (named or where == "DisaggProxyDown")
    labels = frozenset().union(*(there[name][1] for name in named)) | {"le", "job"}
    for group in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels
    assert set(re.findall(r"(\w+)=~?\\?\"", expression)) <= labels
    assert set(re.findall(r"\$labels\.(\w+)", expression)) <= labels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_named_in_other_docs_exist(page) -> None:
    # vLLM's example proxies begin with the same word.
    named = re.findall(r"\b(disagg_proxy_(?!p2p_nccl)\w+)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(listed())


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert dashboard["uid"] and dashboard["title"] and len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_alert_is_documented_and_tested() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (RULES / "alerts.yml").read_text(encoding="utf-8")))
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(Disagg\w+)` ", page, re.M)) == alerts
    assert set(re.findall(r"alertname: (\w+)", (RULES / "alerts_test.yml").read_text(encoding="utf-8"))) == alerts


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, *arguments], cwd=RULES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_promtool_finds_nothing_wrong_with_the_text(machine, pair) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    await machine.stream(PATH, ASK)
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        text = await answer.read()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
