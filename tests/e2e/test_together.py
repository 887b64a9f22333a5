"""Engines of this project's own connector: both legs at once, and decode's answer is right whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from disagg_proxy.cluster.instance import State
from disagg_proxy.discovery.lifeline import Lifelines
from disagg_proxy.sim import SimEngine, encode, expected_chat_text, expected_text
from tests.conftest import Wire, soon
from tests.e2e.conftest import Machine, text_of, text_of_events

OWN = {"connector": "disagg_kv"}
PROMPT = " ".join(f"word{n}" for n in range(20))
TOKENS = len(encode(PROMPT))
CHAT = [{"role": "user", "content": PROMPT}]
COMPLETIONS = "/v1/completions"
ASK: dict[str, Any] = {"model": "sim-model", "prompt": PROMPT, "max_tokens": 8}
REQUESTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: ASK,
    "/v1/chat/completions": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
    "/v1/messages": {"model": "sim-model", "messages": CHAT, "max_tokens": 8},
}
RIGHT = {
    path: expected_text(PROMPT, 8) if "prompt" in body else expected_chat_text(CHAT, 8)
    for path, body in REQUESTS.items()
}
ROUTES = pytest.mark.parametrize("path", REQUESTS)
settings = pytest.mark.settings
in_turn = settings(prefill_policy="round_robin", decode_policy="round_robin", probe_interval=60.0)


@pytest.fixture
async def pair(machine: Machine) -> tuple[SimEngine, SimEngine]:
    return await machine.pair(**OWN)


@pytest.fixture
async def two(machine: Machine) -> tuple[SimEngine, list[SimEngine]]:
    """One prefill and two decodes."""
    prefill, first = await machine.pair(**OWN)
    second = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(second.http_address, State.READY)
    return prefill, [first, second]


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaths that no lifeline tells of."""
    monkeypatch.setattr(Lifelines, "_on_change", lambda self, instance: None)


def external(engine: SimEngine) -> int:
    return int(engine.state()["tokens_by_source"]["external_kv_transfer"])


def computed(engine: SimEngine) -> int:
    return int(engine.state()["tokens_by_source"]["local_compute"])


def transfers(engine: SimEngine, path: str = COMPLETIONS) -> list[dict[str, str]]:
    return [request.json.get("kv_transfer_params") for request in engine.received(path)]


async def clean(machine: Machine, *engines: SimEngine) -> None:
    """Nothing is in flight, held or waited for."""
    await soon(machine.proxy.until_idle())
    await machine.unharmed(*engines)
    for engine in engines:
        assert engine.state().get("kv_wants", 0) == 0
    for instance in machine.proxy.services.registry.instances():
        assert (instance.in_flight, instance.kv_waiting) == (0, 0), instance


async def asked(machine: Machine, body: dict[str, Any] | None = None) -> asyncio.Task[Any]:
    return asyncio.create_task(machine.post(COMPLETIONS, body or ASK))


async def right(answer: Any) -> None:
    status, _, body = await soon(answer)
    assert status == 200, body
    assert text_of(body) == RIGHT[COMPLETIONS]


async def meets(prefill: SimEngine, decode: SimEngine) -> None:
    """Decode's WANT has come to prefill."""
    await soon(decode.wait_until(lambda s: s["kv_waiting"] and s["kv_links"]))
    await soon(prefill.wait_until(lambda s: s["kv_wants"] > 0))


# -- answers


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
async def test_every_route(machine: Machine, pair, path: str, stream: bool) -> None:
    prefill, decode = pair
    if stream:
        assert text_of_events(await machine.stream(path, REQUESTS[path])) == RIGHT[path]
    else:
        assert text_of((await machine.post(path, REQUESTS[path]))[2]) == RIGHT[path]
    assert external(decode) >= TOKENS - 1 and computed(decode) == 1
    (from_prefill,), (from_decode,) = transfers(prefill, path), transfers(decode, path)
    assert from_decode == {**from_prefill, "from": prefill.kv_address}
    await clean(machine, prefill, decode)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_lists_and_n(machine: Machine, pair, stream: bool) -> None:
    prompts = [PROMPT, f"{PROMPT} and more", PROMPT]
    body = {**ASK, "prompt": prompts, "n": 2, "temperature": 1.0}
    wanted = [expected_text(prompt, 8, index=index) for prompt in prompts for index in range(2)]
    if stream:
        found = await machine.stream(COMPLETIONS, body)
        assert [text_of_events(found, index) for index in range(6)] == wanted
    else:
        _, _, answer = await machine.post(COMPLETIONS, body)
        assert [choice["text"] for choice in answer["choices"]] == wanted
    assert external(pair[1]) == TOKENS - 1 + len(encode(prompts[1])) - 1
    await clean(machine, *pair)


async def test_wrong_kv_would_show(machine: Machine, pair) -> None:
    pair[0].faults.corrupt_kv = True
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert status == 200 and text_of(body) != RIGHT[COMPLETIONS]


async def test_decode_is_asked_before_prefill_has_answered(machine: Machine, pair) -> None:
    prefill, decode = pair
    with prefill.faults.held("answer"):
        answer = await asked(machine)
        await meets_held(prefill, decode)
        assert not answer.done()
    await right(answer)
    await clean(machine, prefill, decode)


async def meets_held(prefill: SimEngine, decode: SimEngine) -> None:
    await soon(prefill.wait_until(lambda s: s["held_at"] == "answer"))
    await soon(decode.wait_until(lambda s: s["http_requests"] > 0 and decode.received(COMPLETIONS)))


@ROUTES
async def test_the_clients_request_id_is_everybodys(machine: Machine, pair, path: str) -> None:
    for sent in ("my id/1", None):
        _, headers, body = await machine.post(path, REQUESTS[path], **({"X-Request-Id": sent} if sent else {}))
        seen = {engine.received(path)[-1].headers["X-Request-Id"] for engine in pair}
        assert seen == {headers["X-Request-Id"]} and (sent is None or seen == {sent})
        assert body["id"].endswith(headers["X-Request-Id"]) or headers["X-Request-Id"] in body["id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_those_of_prefill(machine: Machine, stream: bool) -> None:
    await machine.pair(**OWN, enable_prompt_tokens_details=True)
    for cached in (0, (TOKENS - 1) // 16 * 16):
        if stream:
            found = await machine.stream(COMPLETIONS, {**ASK, "stream_options": {"include_usage": True}})
            usage = found[-1]["usage"]
        else:
            usage = (await machine.post(COMPLETIONS, ASK))[2]["usage"]
        assert usage["prompt_tokens"] == TOKENS
        assert (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) == cached


async def test_clients_cannot_steer_the_transfer(machine: Machine, pair) -> None:
    body = {**ASK, "kv_transfer_params": {"transfer_id": "mine", "from": "10.0.0.1:1"}, "request_id": "mine"}
    await right(machine.post(COMPLETIONS, body))
    for engine in pair:
        assert "mine" not in str(engine.received(COMPLETIONS)[0].json)


# -- prefill fails


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["429", "500", "503", "reset", "close"])
async def test_a_prefill_that_fails_costs_the_client_nothing(machine: Machine, pair, how: str, stream: bool) -> None:
    prefill, decode = pair
    if how.isdigit():
        prefill.faults.fail_next(int(how), b"no", path=COMPLETIONS)
    else:
        (prefill.faults.reset_next if how == "reset" else prefill.faults.close_next)(path=COMPLETIONS, times=2)
    if stream:
        assert text_of_events(await soon(machine.stream(COMPLETIONS, ASK))) == RIGHT[COMPLETIONS]
    else:
        await right(machine.post(COMPLETIONS, ASK))
    assert external(decode) == 0
    await clean(machine, prefill, decode)


async def test_a_prefill_that_is_dead_before(unnoticed, machine: Machine, pair) -> None:
    prefill, decode = pair
    await prefill.kill()
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_during(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("forward")
    answer = await asked(machine)
    await meets(prefill, decode)
    await prefill.kill()
    await right(answer)
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_in_mid_push(machine: Machine) -> None:
    prefill, decode = await machine.pair(**OWN, max_num_batched_tokens=16)
    prefill.faults.hold("forward", after=1)
    answer = await asked(machine)
    await soon(prefill.wait_until(lambda s: s["kv_sent"] == 1))
    await prefill.kill()
    await right(answer)
    assert external(decode) == 0
    await clean(machine, decode)


async def test_a_prefill_that_is_killed_after(machine: Machine, pair) -> None:
    prefill, decode = pair
    decode.faults.hold("answer")
    answer = await asked(machine)
    await soon(decode.wait_until(lambda s: s["held_at"] == "answer" and s["running"]))
    await prefill.kill()
    decode.faults.release()
    await right(answer)
    await clean(machine, decode)


@settings(prefill_timeout=0.2)
async def test_a_prefill_that_says_nothing(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hang_next(path=COMPLETIONS)
    await right(machine.post(COMPLETIONS, ASK))
    await clean(machine, decode)


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
async def test_a_frozen_prefill_releases_decode_and_decode_is_not_blamed(machine: Machine, pair) -> None:
    prefill, decode = pair
    prefill.faults.hold("forward")
    await right(asked_now(machine))
    assert machine.proxy.instance(prefill.http_address).freezes == 1
    assert machine.proxy.instance(decode.http_address).freezes == 0
    prefill.faults.release()
    await machine.proxy.until_pairs()
    await clean(machine, prefill, decode)


async def asked_now(machine: Machine) -> Any:
    return await machine.post(COMPLETIONS, ASK)


# -- decode fails


@in_turn
@pytest.mark.parametrize("how", ["500", "503", "reset", "close", "killed"])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_decode_with_a_new_transfer(unnoticed, machine: Machine, two, how: str, stream: bool) -> None:
    prefill, decodes = two
    victim = decodes[0]
    if how.isdigit():
        victim.faults.fail_next(int(how), b"no", path=COMPLETIONS)
    elif how == "killed":
        await victim.kill()
    else:
        (victim.faults.reset_next if how == "reset" else victim.faults.close_next)(path=COMPLETIONS, times=2)
    for _ in range(2):
        if stream:
            assert text_of_events(await soon(machine.stream(COMPLETIONS, ASK))) == RIGHT[COMPLETIONS]
        else:
            await right(machine.post(COMPLETIONS, ASK))
    assert machine.proxy.services.stats.failovers == 1
    ids = [params["transfer_id"] for params in transfers(prefill) if params]
    assert len(ids) == len(set(ids))
    await clean(machine, prefill, *(d for d in decodes if how != "killed" or d is not victim))


@settings(freeze_after_min=0.1, freeze_after_max=0.4)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_frozen_decode_is_replaced(machine: Machine, two, stream: bool) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.hold("forward")
    body = {**ASK, "stream": stream}
    sent = asyncio.create_task(machine.send(COMPLETIONS, body))
    frozen, other = await first_asked(decodes)
    other.faults.release()
    status, _, _ = await soon(sent)
    assert status == 200
    assert machine.proxy.services.stats.failovers == 1
    assert external(other) == TOKENS - 1
    frozen.faults.release()
    await machine.proxy.until_pairs(2)
    await clean(machine, prefill, *decodes)


async def first_asked(decodes: list[SimEngine]) -> tuple[SimEngine, SimEngine]:
    waits = {asyncio.create_task(d.wait_until(lambda s: s["held_at"] == "forward")): d for d in decodes}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    for task in pending:
        task.cancel()
    first = waits[done.pop()]
    return first, next(d for d in decodes if d is not first)


@in_turn
async def test_tries_are_bounded(machine: Machine, two) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.fail_next(503, b"busy", path=COMPLETIONS, times=9)
    status, _, body = await soon(machine.post(COMPLETIONS, ASK))
    assert status == 502 and "503" in body["error"]["message"]
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 2
    await clean(machine, prefill, *decodes)


@in_turn
async def test_no_try_for_a_client_that_has_left(machine: Machine, two, dial: Callable[[str], Any]) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.hang_next(path=COMPLETIONS)
    client = await dial(machine.proxy.url)
    client.post(COMPLETIONS, ASK)
    await soon(asyncio.wait([asyncio.create_task(has_request(d)) for d in decodes], return_when="FIRST_COMPLETED"))
    client.leave()
    await clean(machine, prefill, *decodes)
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 1


async def has_request(engine: SimEngine) -> None:
    await engine.wait_until(lambda s: bool(engine.received(COMPLETIONS)))


@in_turn
async def test_a_refusal_of_decode_is_the_clients(machine: Machine, two) -> None:
    prefill, decodes = two
    for decode in decodes:
        decode.faults.fail_next(422, b'{"error": {"message": "not like this"}}', path=COMPLETIONS)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert (status, body) == (422, {"error": {"message": "not like this"}})
    assert sum(len(decode.received(COMPLETIONS)) for decode in decodes) == 1
    await clean(machine, prefill, *decodes)


async def test_a_mistake_of_the_client(machine: Machine, pair) -> None:
    status, _, body = await machine.post(COMPLETIONS, {**ASK, "temperature": -1})
    assert status == 400 and "temperature" in body["error"]["message"]
    assert machine.proxy.services.stats.failovers == 0
    await clean(machine, *pair)


async def test_decode_broken_in_mid_stream_is_a_cut(machine: Machine, pair, dial) -> None:
    pair[1].faults.cut_stream_after(3)
    client = await dial(machine.proxy.url)
    client.post(COMPLETIONS, {**ASK, "stream": True})
    status, _ = await client.head()
    assert status == 200
    with pytest.raises(asyncio.IncompleteReadError):
        while await client.chunk():
            pass
    assert machine.proxy.services.stats.failovers == 0
    await clean(machine, *pair)


# -- the client leaves


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["queue", "prefill", "prefilled", "decode", "stream"])
async def test_a_client_that_leaves(machine: Machine, pair, dial, moment: str, stream: bool) -> None:
    prefill, decode = pair
    if moment == "queue":
        prefill.faults.hold("schedule")
        decode.faults.hold("schedule")
    elif moment == "prefill":
        prefill.faults.hold("forward")
    elif moment == "prefilled":
        decode.faults.hang_next(path=COMPLETIONS)
    else:
        decode.faults.hold("answer", after=0 if moment == "decode" else 3)
    client: Wire = await dial(machine.proxy.url)
    client.post(COMPLETIONS, {**ASK, "max_tokens": 50, "stream": stream})
    if moment == "queue":
        await soon(prefill.wait_until(lambda s: s["held_at"] == "schedule"))
        await soon(decode.wait_until(lambda s: s["held_at"] == "schedule"))
    elif moment == "prefill":
        await meets(prefill, decode)
    elif moment == "prefilled":
        await soon(prefill.wait_until(lambda s: s["kv_waiting"] and s["finished"] == 1))
        await soon(has_request(decode))
    else:
        await soon(decode.wait_until(lambda s: s["held_at"] == "answer" and s["running"]))
    client.leave()
    await soon(machine.proxy.until_idle())
    prefill.faults.release()
    decode.faults.release()
    await clean(machine, prefill, decode)
    assert machine.proxy.services.stats.outcomes == {"client_left": 1}
    await right(machine.post(COMPLETIONS, ASK))


# -- decode alone


async def test_no_prefill_is_no_reason_to_refuse(machine: Machine) -> None:
    decode = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(decode.http_address, State.READY)
    await right(machine.post(COMPLETIONS, ASK))
    assert transfers(decode) == [None]
    status, health = await machine.get("/health")
    assert (status, health["pairs"], health["decodes_that_serve_alone"]) == (200, 0, 1)
    await clean(machine, decode)


@settings(decode_alone=False)
async def test_unless_it_is_set_so(machine: Machine) -> None:
    decode = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(decode.http_address, State.READY)
    status, headers, body = await machine.post(COMPLETIONS, ASK)
    assert status == 503 and "no prefill instance is ready" in body["error"]["message"]
    assert headers["Retry-After"]
    assert (await machine.get("/health"))[0] == 503


@settings(decode_alone_below=100)
async def test_short_prompts_go_to_decode_alone(machine: Machine, pair) -> None:
    prefill, decode = pair
    await right(machine.post(COMPLETIONS, ASK)) if TOKENS < 100 else None
    body = {**ASK, "prompt": list(range(10, 60))}
    assert (await machine.post(COMPLETIONS, body))[0] == 200
    assert transfers(decode)[-1] is None
    count = len(prefill.received(COMPLETIONS))
    assert (await machine.post(COMPLETIONS, {**body, "prompt": list(range(10, 200))}))[0] == 200
    assert len(prefill.received(COMPLETIONS)) == count + 1
    await clean(machine, prefill, decode)


IMAGE = {"type": "image_url", "image_url": {"url": "http://x.invalid/a.png"}}
ONLY_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_logprobs": (COMPLETIONS, {**ASK, "prompt_logprobs": 1, "stream": True}),
    "prompt_embeds": (COMPLETIONS, {**ASK, "prompt_embeds": "abc"}),
    "beam search": (COMPLETIONS, {**ASK, "use_beam_search": True, "n": 2, "temperature": 0}),
    "chat_template": (
        "/v1/chat/completions",
        {**REQUESTS["/v1/chat/completions"], "chat_template": "{{ messages }}"},
    ),
    "media": (
        "/v1/chat/completions",
        {**REQUESTS["/v1/chat/completions"], "messages": [{"role": "user", "content": [IMAGE]}]},
    ),
}


@pytest.mark.parametrize("what", ONLY_ALONE)
async def test_what_no_pair_can_serve(machine: Machine, pair, what: str) -> None:
    path, body = ONLY_ALONE[what]
    status, _, answer = await machine.send(path, body)
    assert status in (200, 400), answer
    assert not pair[0].received(path)
    assert transfers(pair[1], path) == [None]
    await clean(machine, *pair)


async def test_what_no_pair_can_serve_is_refused_without_such_a_decode(machine: Machine) -> None:
    await machine.pair()
    for path, body in ONLY_ALONE.values():
        assert (await machine.send(path, body))[0] == 400


async def test_it_is_no_mistake_of_the_clients_while_decode_is_down(machine: Machine, pair) -> None:
    await pair[1].kill()
    await machine.proxy.until_state(pair[1].http_address, State.PROBING)
    path, body = ONLY_ALONE["beam search"]
    assert (await machine.send(path, body))[0] == 503


async def test_prompt_logprobs_are_right(machine: Machine, pair) -> None:
    body = {**ASK, "max_tokens": 1, "prompt_logprobs": 1}
    _, _, answer = await machine.post(COMPLETIONS, body)
    found = answer["choices"][0]["prompt_logprobs"]
    assert len(found) == TOKENS and all(-5 <= list(e.values())[0]["logprob"] <= 0 for e in found[1:])
    await clean(machine, *pair)


# -- which engines meet


@in_turn
async def test_both_kinds_behind_one_proxy(machine: Machine) -> None:
    old = await machine.pair()
    new = await machine.pair(**OWN)
    for _ in range(6):
        await right(machine.post(COMPLETIONS, ASK))
    assert machine.proxy.services.pairing.ready_pairs() == 2
    for engine in old:
        for request in engine.received(COMPLETIONS):
            assert old[0].kv_address in request.headers["X-Request-Id"]
            assert old[1].kv_address in request.headers["X-Request-Id"]
    assert {params["from"] for params in transfers(new[1]) if params} == {new[0].kv_address}
    assert all(engine.received(COMPLETIONS) for engine in (*old, *new))
    _, stats = await machine.get("/stats")
    why = {i["http_address"]: i["cannot_exchange_because"] for i in stats["instances"]}
    assert why[old[0].http_address] == {new[1].http_address: "prefill speaks p2p_nccl, decode disagg_kv"}
    assert why[new[0].http_address] == {old[1].http_address: "prefill speaks disagg_kv, decode p2p_nccl"}
    path, body = ONLY_ALONE["beam search"]
    assert (await machine.send(path, body))[0] == 200
    await clean(machine, *old, *new)


@in_turn
async def test_a_retry_stays_with_its_protocol(machine: Machine) -> None:
    await machine.pair()
    prefill, first = await machine.pair(**OWN)
    second = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(second.http_address, State.READY)
    for decode in (first, second):
        decode.faults.fail_next(503, b"busy", path=COMPLETIONS)
        for _ in range(6):
            await right(machine.post(COMPLETIONS, ASK))
        decode.faults.injected_for(COMPLETIONS)
    assert machine.proxy.services.stats.failovers >= 1


@pytest.mark.parametrize(
    ("trait", "why"),
    [
        ({"kv_dtype": "float16"}, "dtype is bfloat16, on decode float16"),
        ({"kv_block_size": 32}, "block_size is 16, on decode 32"),
        ({"tp": 2}, "tp is 1, on decode 2"),
        ({"kv_model": "other"}, "kv_model is sim, on decode other"),
        ({"kv_transports": ("nccl",)}, "no common transport"),
    ],
)
@settings(decode_alone=False)
async def test_caches_that_differ_make_no_pair(machine: Machine, trait: dict[str, Any], why: str) -> None:
    prefill = await machine.engine("prefill", **OWN)
    decode = await machine.engine("decode", **OWN, **trait)
    for engine in (prefill, decode):
        await machine.proxy.until_state(engine.http_address, State.READY)
    status, _, body = await machine.post(COMPLETIONS, ASK)
    assert status == 503 and why in body["error"]["message"]
    health_status, health = await machine.get("/health")
    assert health_status == 503 and why in str(health["missing"])
    for text in (str(body), str(health)):
        assert "127.0.0.1" not in text
    _, stats = await machine.get("/stats")
    found = next(i for i in stats["instances"] if i["role"] == "prefill")
    assert why in found["cannot_exchange_because"][decode.http_address]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_restarted_engine_is_out_at_once_and_back_after_a_probe(machine: Machine, pair, role: str) -> None:
    await right(machine.post(COMPLETIONS, ASK))
    old = pair[0 if role == "prefill" else 1]
    await old.kill()
    await machine.proxy.until_state(old.http_address, State.PROBING)
    new = old.restarted()
    await new.start()
    machine.engines.append(new)
    await soon(machine.proxy.until_pairs())
    instance = machine.proxy.instance(new.http_address)
    await soon(machine.proxy.until(lambda: instance.boot == new.state()["boot_id"] and instance.state is State.READY))
    before = external(new) if role == "decode" else external(pair[1])
    await right(machine.post(COMPLETIONS, ASK))
    assert external(new if role == "decode" else pair[1]) == before + TOKENS - 1
    await clean(machine, new)


# -- many at once


async def test_two_hundred_requests_with_a_prefill_that_dies_among_them(machine: Machine) -> None:
    prefills = [(await machine.pair(**OWN))[0] for _ in range(2)]
    decodes = [engine for engine in machine.engines if engine not in prefills]

    async def one(number: int) -> None:
        prompt = f"{number} {PROMPT}"
        _, _, body = await machine.post(COMPLETIONS, {**ASK, "prompt": prompt})
        assert text_of(body) == expected_text(prompt, 8)
        if number == 50:
            await prefills[0].kill()

    await soon(asyncio.gather(*(one(number) for number in range(200))), 60)
    await clean(machine, prefills[1], *decodes)


@pytest.mark.parametrize("seed", range(3))
async def test_a_hundred_clients_that_leave_at_random_moments(machine: Machine, dial, seed: int) -> None:
    rng = random.Random(seed)
    prefill, decode = await machine.pair(**OWN, prefill_tokens_per_second=20_000, time_per_output_token=0.001)

    async def visit() -> None:
        path = rng.choice(list(REQUESTS))
        body = {**REQUESTS[path], "max_tokens": rng.choice([1, 20, 200]), "stream": rng.random() < 0.7}
        ticks = rng.randrange(400)
        client = await dial(machine.proxy.url)
        client.post(path, body)
        for _ in range(ticks):
            await asyncio.sleep(0)
        client.leave()

    await soon(asyncio.gather(*(visit() for _ in range(100))), 30)
    await clean(machine, prefill, decode)
    await right(machine.post(COMPLETIONS, ASK))
