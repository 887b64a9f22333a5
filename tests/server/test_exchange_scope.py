"""Whatever way an exchange ends, its flights end with it."""

import asyncio
import logging

import pytest

from disagg_proxy.errors import StreamCut
from disagg_proxy.server.asgi.exchange_scope import ExchangeScopeMiddleware, own


class Left:
    """Stands for a flight."""

    def __init__(self) -> None:
        self.times = 0

    def leave(self) -> None:
        self.times += 1


async def run(flights: list[Left], ends_with: BaseException | None = None) -> None:
    async def app(scope, receive, send) -> None:
        for flight in flights:
            own(scope, flight)
        if ends_with is not None:
            raise ends_with

    async def send(message) -> None:
        raise RuntimeError("Unexpected ASGI message: the response has begun")

    await ExchangeScopeMiddleware(app)({"type": "http"}, None, send)


async def test_flights_end_with_a_finished_exchange() -> None:
    flights = [Left(), Left()]
    await run(flights)
    assert [flight.times for flight in flights] == [1, 1]


@pytest.mark.parametrize("cause", [StreamCut("why"), asyncio.CancelledError()], ids=["cut", "shutdown"])
async def test_a_cut_is_logged_and_leaves_the_response_unfinished(cause: BaseException, caplog) -> None:
    flight = Left()
    await run([flight], cause)
    assert flight.times == 1
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and said.exc_info is None
    assert said.getMessage().startswith("An answer was cut off: ")


async def test_a_bug_goes_on_to_the_server_after_the_flights_have_ended() -> None:
    flight = Left()
    with pytest.raises(ValueError, match="a bug"):
        await run([flight], ValueError("a bug"))
    assert flight.times == 1


async def test_the_lifespan_owns_no_flights() -> None:
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append(dict(scope))

    await ExchangeScopeMiddleware(app)({"type": "lifespan"}, None, None)
    assert seen == [{"type": "lifespan"}]


async def test_a_flight_that_comes_after_the_end_ends_at_once() -> None:
    """Quart's handler runs on when its ASGI call is cancelled."""
    scopes = []

    async def app(scope, receive, send) -> None:
        scopes.append(scope)
        raise asyncio.CancelledError

    async def send(message) -> None:
        pass

    await ExchangeScopeMiddleware(app)({"type": "http"}, None, send)
    late = Left()
    with pytest.raises(asyncio.CancelledError):
        own(scopes[0], late)
    assert late.times == 1
