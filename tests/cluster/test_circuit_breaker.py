"""A circuit breaker on a clock that the test reads out to it."""

from disagg_proxy.cluster.circuit_breaker import (
    FAILURES_TO_OPEN,
    MAX_OPEN_SECONDS,
    MIN_OPEN_SECONDS,
    Breaker,
    BreakerState,
)


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.record_sent(at)
        breaker.record_failure(at)
    return breaker


def test_a_few_failures_leave_it_closed_and_a_success_forgets_them() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.record_failure(0.0)
        breaker.record_success()
    assert breaker.state(0.0) is BreakerState.CLOSED and breaker.permits(0.0)


def test_failures_in_a_row_open_it_for_a_while() -> None:
    breaker = opened()
    assert breaker.state(1.0) is BreakerState.OPEN and not breaker.permits(1.0)
    assert breaker.state(MIN_OPEN_SECONDS) is BreakerState.HALF_OPEN and breaker.permits(MIN_OPEN_SECONDS)


def test_half_open_lets_one_request_decide() -> None:
    breaker = opened()
    breaker.record_sent(MIN_OPEN_SECONDS)
    assert not breaker.permits(MIN_OPEN_SECONDS)
    breaker.record_success()
    assert breaker.state(MIN_OPEN_SECONDS) is BreakerState.CLOSED and breaker.permits(MIN_OPEN_SECONDS)


def test_a_failed_trial_doubles_the_pause_up_to_a_bound() -> None:
    breaker, now, pause = opened(), 0.0, MIN_OPEN_SECONDS
    for _ in range(8):
        now += pause
        breaker.record_sent(now)
        breaker.record_failure(now)
        pause = min(pause * 2, MAX_OPEN_SECONDS)
        assert not breaker.permits(now + pause - 0.01) and breaker.permits(now + pause)
    assert pause == MAX_OPEN_SECONDS


def test_a_trial_without_a_verdict_lets_the_next_one_try() -> None:
    breaker = opened()
    breaker.record_sent(MIN_OPEN_SECONDS)
    breaker.release_trial()
    assert breaker.permits(MIN_OPEN_SECONDS)


def test_failures_of_requests_sent_before_it_opened_change_nothing() -> None:
    breaker = opened()
    for _ in range(50):
        breaker.record_failure(0.1)
    assert breaker.permits(MIN_OPEN_SECONDS)
