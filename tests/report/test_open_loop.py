"""The project's load generator against small servers that behave in known ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

from aiohttp import web

from disagg_report.arrivals import Workload
from disagg_report.open_loop import OpenLoopClient
from tests.ports import hold_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
WORKLOAD = Workload("m", input_tokens=8, output_tokens=3, seconds=0.2, seed=1)
RATE = 40.0  # 8 requests


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def stream(*events: str) -> Handler:
    """Answers with these events."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()
        await answer.prepare(request)
        for event in events:
            await answer.write(f"data: {event}\n\n".encode())
        return answer

    return handler


TOKEN = '{"choices":[{"index":0,"text":"a"}],"usage":null}'
USAGE = '{"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":3,"total_tokens":11}}'
GOOD = stream(TOKEN, TOKEN, TOKEN, USAGE, "[DONE]")


def ignore(answered: int, failed: int, planned: int) -> None:
    pass


async def test_every_planned_request_is_sent_and_its_tokens_are_timed() -> None:
    seen: list[tuple[int, int, int]] = []
    async with server(GOOD) as url:
        found = await OpenLoopClient([url], WORKLOAD).measure(RATE, asyncio.Event(), lambda *now: seen.append(now))
    assert len(found.shots) == 8 and all(shot.answered for shot in found.shots)
    assert {(len(shot.itl_ms), shot.output_tokens, shot.prompt_tokens) for shot in found.shots} == {(2, 3, 8)}
    assert all(
        shot.ttft_ms is not None and shot.latency_ms >= shot.ttft_ms > 0 for shot in found.shots if shot.latency_ms
    )
    assert seen[-1] == (8, 0, 8)
    assert [shot.sent for shot in found.shots] == sorted(shot.sent or 0 for shot in found.shots)
    assert not found.interrupted and found.client_cpu is not None


async def test_the_key_is_sent_and_engines_get_requests_in_turn() -> None:
    keys: list[str] = []
    counts = [0, 0]

    def counting(at: int) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            counts[at] += 1
            keys.append(request.headers["Authorization"])
            return await GOOD(request)

        return handler

    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(server(counting(at))) for at in range(2)]
        await OpenLoopClient(urls, WORKLOAD, "secret").measure(RATE, asyncio.Event(), ignore)
    assert counts == [4, 4] and set(keys) == {"Bearer secret"}


async def failure(handler: Handler) -> str:
    async with server(handler) as url:
        found = await OpenLoopClient([url], WORKLOAD, patience=5).measure(RATE, asyncio.Event(), ignore)
    assert not any(shot.answered for shot in found.shots)
    (error,) = {shot.error for shot in found.shots}
    assert error is not None
    return error


async def test_failures_have_different_errors() -> None:
    async def refused(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "queue full"}}, status=429)

    async def cut(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(f"data: {TOKEN}\n\n".encode())
        assert request.transport is not None
        request.transport.abort()
        return answer

    assert await failure(refused) == 'HTTP 429: {"error": {"message": "queue full"}}'
    assert "closed early" in await failure(cut)
    assert await failure(stream(TOKEN, USAGE)) == "the stream ended without [DONE]"
    assert await failure(stream(USAGE, "[DONE]")) == "the stream had no tokens"
    assert "boom" in await failure(stream(TOKEN, '{"error":{"message":"boom"}}', "[DONE]"))
    assert "JSONDecodeError" in await failure(stream("{", "[DONE]"))


async def test_connection_refused() -> None:
    with ExitStack() as hold:
        url = f"http://127.0.0.1:{hold_port(hold)}"
        found = await OpenLoopClient([url], WORKLOAD).measure(RATE, asyncio.Event(), ignore)
    assert len(found.shots) == 8 and all("cannot connect" in (shot.error or "") for shot in found.shots)


def hanging(begun: asyncio.Event) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(f"data: {TOKEN}\n\n".encode())
        begun.set()
        await asyncio.Event().wait()
        return answer

    return handler


async def test_answers_that_do_not_come_are_failures_after_a_bounded_time() -> None:
    async with server(hanging(asyncio.Event())) as url:
        found = await OpenLoopClient([url], WORKLOAD, patience=0.1).measure(RATE, asyncio.Event(), ignore)
    assert [shot.error for shot in found.shots] == ["no complete response within 0.1 s after the last request"] * 8


async def test_stopped_it_keeps_only_complete_responses() -> None:
    begun, stop = asyncio.Event(), asyncio.Event()
    slow = hanging(begun)
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        return await (GOOD if count == 1 else slow)(request)

    async with server(handler) as url:
        work = asyncio.create_task(OpenLoopClient([url], WORKLOAD).measure(RATE, stop, ignore))
        await begun.wait()
        stop.set()
        found = await work
    assert found.interrupted and [shot.answered for shot in found.shots] == [True]


async def test_warm_up_reports_failures() -> None:
    async with server(GOOD) as url:
        assert all(shot.answered for shot in await OpenLoopClient([url], WORKLOAD).warm_up(3))
    async with server(stream("[DONE]")) as url:
        assert not any(shot.answered for shot in await OpenLoopClient([url], WORKLOAD).warm_up(3))
