"""What an error says about a retry; the clients that obey it are in tests/e2e/test_retry_headers.py."""

from __future__ import annotations

import pytest

from disagg_proxy import errors
from disagg_proxy.errors import ProxyError, answer_of, retry_headers

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ProxyError)]
each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

RETRY = {
    "ProxyError": None, "ClientError": False, "BodyTimeout": None, "HeadTimeout": None, "NotServed": False,
    "RateLimited": True,
    "UnsupportedVersion": False, "Unavailable": True, "Overloaded": True, "NoPair": True, "EngineError": True,
    "EngineBusy": True, "EngineDeadline": None, "EngineFrozen": True,
}  # fmt: skip
"""Whether a retry helps; what has no line is as its base."""


@each
def test_whether_a_retry_helps(kind: type[ProxyError]) -> None:
    line = next(base.__name__ for base in kind.__mro__ if base.__name__ in RETRY)
    assert kind.retry is RETRY[line]


@each
def test_a_5xx_of_the_clients_making_is_not_to_be_repeated(kind: type[ProxyError]) -> None:
    if kind.status in (501, 505):
        assert kind.retry is False
    if kind.status in (429, 503):
        assert kind.retry is True, "it says when in Retry-After"


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (errors.NotServed("x"), {"x-should-retry": "false"}),
        (errors.WrongKey("x"), {"x-should-retry": "false", "www-authenticate": "Bearer"}),
        (errors.MethodNotAllowed(["GET"]), {"x-should-retry": "false", "allow": "GET"}),
        (errors.UnsupportedEncoding("x"), {"x-should-retry": "false", "accept-encoding": "identity"}),
        (errors.shutting_down(), {"x-should-retry": "true", "retry-after": "5"}),
        (errors.Overloaded("x"), {"x-should-retry": "true", "retry-after": "2"}),
        (errors.EngineDeadline("x"), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_headers(error: ProxyError, headers: dict[str, str]) -> None:
    status, got, _ = answer_of(error)
    found = {name.decode(): value.decode() for name, value in got}
    assert status == error.status and found == {"content-type": "application/json", **headers}


def test_only_an_engines_501_gets_a_header_of_the_proxy() -> None:
    assert [status for status in range(200, 600) if retry_headers(status)] == [501]
    assert retry_headers(501) == [(b"x-should-retry", b"false")]
