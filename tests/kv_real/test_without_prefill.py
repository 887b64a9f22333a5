"""Prefill dies, and answers are right all the same. The last file of its folder: nobody starts prefill again, which
``test_proxy.py`` shows.
"""

from __future__ import annotations

import asyncio
import time

from tests.kv_real.conftest import LOAD_SECONDS, Trio, texts
from tests.kv_real.test_pair import _body


async def test_prefill_killed_after_during_and_before_the_push(trio: Trio) -> None:
    after = _body(trio.prompt(100), tokens=400)
    running = asyncio.create_task(trio.both(after))
    during = _body(trio.prompt(100))
    await asyncio.sleep(0.5)
    trio.prefill.fault.write_text("slow")
    waiting = asyncio.create_task(trio.decode.post(during, transfer_id="p-dies", from_=trio.prefill.kv_address))
    await trio.prefill.post({**during, "max_tokens": 1}, transfer_id="p-dies")
    await asyncio.sleep(0.3)
    assert not waiting.done()
    trio.prefill.kill()
    start = time.monotonic()
    assert texts(await waiting) == texts(await trio.plain.post(during))
    assert time.monotonic() - start < LOAD_SECONDS - 1, "the end of the connection is noticed, not waited for"
    assert texts((await running)[1]) == texts(await trio.plain.post(after))

    before, start = _body(trio.prompt(100)), time.monotonic()
    answer = await trio.decode.post(before, transfer_id="dead", from_=trio.prefill.kv_address)
    assert texts(answer) == texts(await trio.plain.post(before))
    assert time.monotonic() - start < LOAD_SECONDS / 2
