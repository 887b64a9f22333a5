"""Resources are released with their exchange, however it ends."""

import asyncio
import logging

import pytest

from disagg_proxy.errors import EngineFailed, StreamCut
from disagg_proxy.server.asgi.exchange_scope import ERROR_EVENT, ExchangeScopeMiddleware, leave_with_exchange


class Resource:
    """Counts its releases."""

    def __init__(self) -> None:
        self.times = 0

    def leave(self) -> None:
        self.times += 1


async def run(resources: list[Resource], ends_with: BaseException | None = None) -> None:
    async def app(scope, receive, send) -> None:
        for resource in resources:
            leave_with_exchange(scope, resource)
        if ends_with is not None:
            raise ends_with

    async def send(message) -> None:
        raise RuntimeError("Unexpected ASGI message: the response has begun")

    await ExchangeScopeMiddleware(app)({"type": "http"}, None, send)


async def test_resources_are_released_with_a_complete_exchange() -> None:
    resources = [Resource(), Resource()]
    await run(resources)
    assert [resource.times for resource in resources] == [1, 1]


@pytest.mark.parametrize("cause", [StreamCut(EngineFailed("why")), asyncio.CancelledError()], ids=["cut", "shutdown"])
async def test_a_cut_is_logged_and_leaves_the_response_incomplete(cause: BaseException, caplog) -> None:
    resource = Resource()
    await run([resource], cause)
    assert resource.times == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.exc_info is None
    assert record.getMessage().startswith("An answer was cut off: ")


async def test_a_response_that_has_not_begun_gets_no_error_event() -> None:
    """The grace time of a shutdown may end between a handler's return and the head of its response."""
    resource, sent = Resource(), []

    async def app(scope, receive, send) -> None:
        leave_with_exchange(scope, resource)
        scope[ERROR_EVENT] = lambda error: error.message.encode()
        raise asyncio.CancelledError

    async def send(message) -> None:
        if not sent and message["type"] == "http.response.body":
            raise RuntimeError("Expected ASGI message 'http.response.start'")
        sent.append(message)

    await ExchangeScopeMiddleware(app)({"type": "http"}, None, send)
    assert [message.get("status") for message in sent] == [503, None] and resource.times == 1


async def test_an_unexpected_exception_reaches_the_server_after_the_release() -> None:
    resource = Resource()
    with pytest.raises(ValueError, match="a bug"):
        await run([resource], ValueError("a bug"))
    assert resource.times == 1


async def test_the_lifespan_has_no_resources() -> None:
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append(dict(scope))

    await ExchangeScopeMiddleware(app)({"type": "lifespan"}, None, None)
    assert seen == [{"type": "lifespan"}]


async def test_a_resource_added_after_the_end_is_released_at_once() -> None:
    """Quart's handler runs on when its ASGI call is cancelled."""
    scopes = []

    async def app(scope, receive, send) -> None:
        scopes.append(scope)
        raise asyncio.CancelledError

    async def send(message) -> None:
        pass

    await ExchangeScopeMiddleware(app)({"type": "http"}, None, send)
    late = Resource()
    with pytest.raises(asyncio.CancelledError):
        leave_with_exchange(scopes[0], late)
    assert late.times == 1
