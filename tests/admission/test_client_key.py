"""Limits per minute by a fake clock, their headers, and the models of a key."""

from __future__ import annotations

import time

import pytest

from disagg_proxy.admission import client_key
from disagg_proxy.admission.client_key import ClientKey, RateLimit, go_duration, rfc3339
from disagg_proxy.cluster.instance import Role
from disagg_proxy.errors import BadRequest, NoPair, UnknownModel
from disagg_proxy.telemetry.stats import Stats
from tests.cluster.conftest import World


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats(clock: Clock) -> Stats:
    return Stats(clock)


def limited(clock: Clock, requests: int = 0, tokens: int = 0) -> ClientKey:
    return ClientKey(
        "alice",
        requests=RateLimit(requests, clock()) if requests else None,
        tokens=RateLimit(tokens, clock()) if tokens else None,
    )


def admitted(key: ClientKey, stats: Stats, tokens: int = 0) -> bool:
    return key.admit(tokens, stats, False) is None


def test_a_minutes_requests_at_once_and_then_one_by_one(clock: Clock, stats: Stats) -> None:
    key = limited(clock, requests=60)
    assert [admitted(key, stats) for _ in range(61)] == [True] * 60 + [False]
    clock.now += 0.99
    assert not admitted(key, stats)
    clock.now += 0.01
    assert admitted(key, stats) and not admitted(key, stats)
    clock.now += 3600
    assert sum(admitted(key, stats) for _ in range(100)) == 60, "an idle hour is worth no more than a minute"


def test_any_minute_has_at_most_twice_the_limit_and_the_mean_is_the_limit(clock: Clock, stats: Stats) -> None:
    key = limited(clock, requests=30)
    times = []
    for _ in range(3000):
        clock.now += 0.1
        if admitted(key, stats):
            times.append(clock.now)
    assert len(times) == 179, "30 at once, and then one in each 2 s of 300 s, less what the full bucket did not take"
    most = max(sum(start <= one < start + 60 for one in times) for start in times)
    assert 30 < most <= 60


def test_a_refusal_says_when_to_come_again_and_charges_nothing(clock: Clock, stats: Stats) -> None:
    key = limited(clock, requests=2, tokens=600)
    assert admitted(key, stats, 500)
    refusal = key.admit(400, stats, False)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.type) == (429, "rate_limit_exceeded", "tokens")
    assert refusal.retry_after == 30
    assert refusal.message == "API key 'alice' has reached its limit of 600 tokens a minute; try again in 30s."
    assert admitted(key, stats, 100), "neither a request nor a token was charged"
    refusal = key.admit(0, stats, True)
    assert refusal is not None
    assert (refusal.type, refusal.kind) == ("rate_limit_error", "requests")
    assert refusal.headers() == {"Retry-After": "30", "X-Should-Retry": "true"}
    assert dict(stats.key_refusals) == {"alice\ttokens": 1, "alice\trequests": 1}
    clock.now += 29.99
    refusal = key.admit(0, stats, False)
    assert refusal is not None and refusal.retry_after == 1, "never 0, which clients take for at once"


def test_an_answer_beyond_the_limit_is_paid_back(clock: Clock, stats: Stats) -> None:
    key = limited(clock, tokens=600)
    assert admitted(key, stats, 100)
    key.settle(1100, clock())
    clock.now += 60
    assert not admitted(key, stats, 1), "600 of 1200 are paid back: nothing is left"
    clock.now += 1
    assert admitted(key, stats, 10)


def test_a_prompt_above_the_limit_gets_a_full_bucket(clock: Clock, stats: Stats) -> None:
    key = limited(clock, tokens=600)
    assert admitted(key, stats, 60)
    assert not admitted(key, stats, 6000)
    clock.now += 6
    assert admitted(key, stats, 6000)
    assert not admitted(key, stats, 1)


def test_what_was_estimated_too_high_is_given_back(clock: Clock, stats: Stats) -> None:
    key = limited(clock, tokens=600)
    assert admitted(key, stats, 600)
    key.settle(-500, clock())
    assert admitted(key, stats, 500)
    key.settle(-5000, clock())
    assert not admitted(key, stats, 600) or (key.tokens is not None and key.tokens.level(clock()) <= 600)


def test_a_clock_that_does_not_move_and_many_small_steps_lose_nothing(clock: Clock) -> None:
    limit = RateLimit(7, clock())
    limit.take(7, clock())
    for _ in range(600):
        clock.now += 0.1
        limit.level(clock())
    assert limit.level(clock()) == pytest.approx(7)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0000001, "1ms"), (0.0121, "13ms"), (1, "1s"), (59.9999, "1m0s"), (8.64, "8.64s"),
        (90.5, "1m30.5s"), (360, "6m0s"), (3600, "1h0m0s"), (86399.001, "23h59m59.001s"),
    ],
)  # fmt: skip
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def test_headers_of_both_apis(clock: Clock, stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    key = limited(clock, requests=60, tokens=600)
    assert admitted(key, stats, 101)
    assert dict(key.headers(clock(), False)) == {
        b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s", b"x-ratelimit-limit-tokens": b"600",
        b"x-ratelimit-remaining-tokens": b"499", b"x-ratelimit-reset-tokens": b"10.1s",
    }  # fmt: skip
    assert dict(key.headers(clock(), True)) == {
        b"anthropic-ratelimit-requests-limit": b"60", b"anthropic-ratelimit-requests-remaining": b"59",
        b"anthropic-ratelimit-requests-reset": b"2023-11-14T22:13:21Z", b"anthropic-ratelimit-tokens-limit": b"600",
        b"anthropic-ratelimit-tokens-remaining": b"499", b"anthropic-ratelimit-tokens-reset": b"2023-11-14T22:13:31Z",
    }  # fmt: skip
    key.settle(1000, clock())
    assert dict(key.headers(clock(), False))[b"x-ratelimit-remaining-tokens"] == b"0"
    assert limited(clock).headers(clock(), False) == []
    assert client_key.rfc3339 is rfc3339


def test_models() -> None:
    world = World()
    world.ready(Role.PREFILL, 1)
    everything, mine = ClientKey("all"), ClientKey("one", frozenset({"m", "not here"}))
    other = ClientKey("other", frozenset({"not here"}))
    for key in (everything, mine):
        key.check_model("m", world.registry)
        key.check_model(None, world.registry)
    everything.check_model("nobody's", world.registry)
    with pytest.raises(UnknownModel, match=r"The model 'x' does not exist here\. Models that exist: m\."):
        mine.check_model("x", world.registry)
    with pytest.raises(UnknownModel, match="Models that exist: none yet"):
        other.check_model("m", world.registry)
    with pytest.raises(BadRequest, match="model must be named"):
        other.check_model(None, world.registry)


def test_an_error_names_no_model_that_the_key_may_not_use() -> None:
    world = World()
    world.ready(Role.PREFILL, 1)
    key, error = ClientKey("k", frozenset({"lora"})), UnknownModel("lora", ["m", "secret"])
    assert "secret" not in key.visible(error, world.registry).message
    assert ClientKey("all").visible(error, world.registry) is error
    other = NoPair(["x"])
    assert key.visible(other, world.registry) is other
