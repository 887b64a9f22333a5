"""What the proxy says of itself: /livez, /health, /stats and /metrics."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from disagg_proxy import __version__, compiled
from tests.simulated import REQUESTS

PATH = "/v1/completions"


async def scrape(machine) -> dict[str, float]:
    """Samples by name and the values of their labels, these in the order of the labels' names."""
    async with machine.http.get(machine.proxy.url + "/metrics") as answer:
        assert answer.status == 200 and answer.content_type == "text/plain"
        families = list(text_string_to_metric_families(await answer.text()))
    beginnings = ("disagg_proxy_", "process_", "python_")
    assert all(family.documentation and family.name.startswith(beginnings) for family in families)
    samples = [sample for family in families for sample in family.samples]
    return {
        " ".join(
            [one.name.removeprefix("disagg_proxy_"), *(one.labels[name] for name in sorted(one.labels))]
        ): one.value
        for one in samples
    }


async def test_livez_says_only_that_the_process_runs(machine) -> None:
    assert await machine.get("/livez") == (200, {"status": "ok"})


async def test_health_names_what_is_missing_until_a_pair_is_there(machine) -> None:
    status, body = await machine.get("/health")
    assert (status, body["status"], body["pairs"]) == (503, "unavailable", 0)
    assert body["prefill"] == body["decode"] == {"ready": 0, "known": 0}
    assert len(body["missing"]) == 2
    prefill = await machine.engine("prefill")
    await machine.proxy.until(lambda: bool(machine.proxy.services.registry.models()))
    status, body = await machine.get("/health")
    assert (status, body["prefill"], body["decode"]["ready"]) == (503, {"ready": 1, "known": 1}, 0)
    assert len(body["missing"]) == 1 and "decode" in body["missing"][0]
    await machine.engine("decode")
    await machine.proxy.until_pairs(1)
    status, body = await machine.get("/health")
    assert (status, body["status"], body["pairs"], body["missing"]) == (200, "ok", 1, [])
    assert prefill.http_address not in str(body)


async def test_health_tells_of_engines_that_do_not_fit_together(machine) -> None:
    await machine.engine("prefill", models=("one",))
    await machine.engine("decode", models=("two",))
    await machine.proxy.until(lambda: len(machine.proxy.services.registry.models()) == 2)
    status, body = await machine.get("/health")
    assert (status, body["missing"]) == (503, ["no prefill and decode instance serve the same model"])


async def test_stats_show_every_instance(machine, pair) -> None:
    await machine.post(PATH, REQUESTS[PATH])
    status, body = await machine.get("/stats")
    assert (status, body["version"]) == (200, __version__) and body["uptime_s"] > 0
    assert body["compiled"] is compiled()
    for engine, shown in zip(pair, sorted(body["instances"], key=lambda one: one["role"], reverse=True), strict=True):
        assert shown["role"] == engine.config.role
        assert (shown["http_address"], shown["kv_address"]) == (engine.http_address, engine.kv_address)
        assert (shown["models"], shown["state"], shown["source"]) == (["sim-model"], "ready", "ping")
        assert 0 <= shown["last_ping_age_s"] < 10
        assert (shown["in_flight"], shown["requests_total"], shown["failures_total"]) == (0, 1, 0)
    assert body["discovery"]["messages"] >= 2 and not body["discovery"]["dropped"]


async def test_stats_count_requests_by_their_end_and_time_them(machine, pair) -> None:
    for _ in range(3):
        await machine.post(PATH, REQUESTS[PATH])
        await machine.stream(PATH, REQUESTS[PATH])
    await machine.post(PATH, {"prompt": ""})
    pair[0].faults.fail_next(500, path=PATH)
    await machine.post(PATH, REQUESTS[PATH])
    await machine.post(PATH, {"prompt": "x", "max_tokens": 1, "prompt_logprobs": 1})
    await machine.unharmed(*pair)
    _, body = await machine.get("/stats")
    assert body["requests"]["outcomes"] == {"ok": 7, "client_error": 1, "engine_error": 1}
    assert (body["requests"]["finished"], body["requests"]["in_flight"], body["requests"]["in_background"]) == (9, 0, 0)
    assert body["kv_releases"] == {"started": 1, "done": 1, "failed": 0, "waiting": 0, "tokens": 1}
    assert body["drains"] == body["kv_releases"], "its former name, for one release"
    assert body["latency"]["total"]["count"] == 7
    assert body["latency"]["ttft"]["count"] == 3, "of those that are streamed"
    for name in ("prefill", "ttft", "total"):
        found = body["latency"][name]
        assert 0 < found["p50_s"] <= found["p90_s"] <= found["p99_s"] <= found["max_s"] < 10


async def load(machine) -> tuple[int, list[int]]:
    _, body = await machine.get("/stats")
    return body["requests"]["in_flight"], [one["in_flight"] for one in body["instances"]]


async def test_load_counts_until_the_stream_ends(machine, pair) -> None:
    _, decode = pair
    body = {**REQUESTS[PATH], "stream": True}
    with decode.faults.held("answer"):
        requests = [asyncio.create_task(machine.stream(PATH, body)) for _ in range(4)]
        await decode.wait_until(lambda state: state["held_at"] == "answer" and state["running"] + state["waiting"] == 4)
        assert await load(machine) == (4, [0, 4])
        # One token each, and the headers with it, but no end.
        decode.faults.step("answer")
        await decode.wait_until(lambda state: state["held_at"] == "answer" and state["steps"] >= 1)
        assert await load(machine) == (4, [0, 4])
    await asyncio.gather(*requests)
    await machine.unharmed(*pair)
    assert await load(machine) == (0, [0, 0])
    assert (await machine.get("/stats"))[1]["requests"]["outcomes"] == {"ok": 4}


async def test_metrics_are_what_a_prometheus_parser_reads(machine, pair) -> None:
    await machine.post(PATH, REQUESTS[PATH])
    await machine.post(PATH, {"prompt": "x", "max_tokens": 1, "prompt_logprobs": 1})
    await machine.unharmed(*pair)
    found = await scrape(machine)
    for engine, legs in zip(pair, (2, 1), strict=True):
        where = f"{engine.http_address} {engine.config.role}"
        assert found[f"instance_ready {where}"] == 1
        assert found[f"instance_in_flight {where}"] == found[f"instance_failures_total {where}"] == 0
        assert found[f"instance_requests_total {where}"] >= legs
    assert found[f"requests_total  sim-model ok {PATH}"] == 2
    assert [found[f"kv_releases_total {result}"] for result in ("started", "done", "failed")] == [1, 1, 0]
    assert found["requests_in_flight"] == 0 and found["registrations_total"] >= 2


async def test_metrics_without_engines(machine) -> None:
    assert (await scrape(machine))["requests_in_flight"] == 0
