"""The internal id leaves no trace, wherever a read ends."""

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.request_id import NoRewriting, RequestId, RequestIdRewriter, WholeEvents, hide

ID = RequestId("___prefill_addr_127.0.0.1:21001___decode_addr_127.0.0.1:22001_00ff", "ab" * 33)
INTERNAL, PUBLIC = ID.internal.encode(), ID.public.encode()


def relayed(body: bytes, cuts: list[int]) -> bytes:
    rewriter, out, last = RequestIdRewriter(ID), b"", 0
    for cut in sorted(cuts):
        out += rewriter.feed(body[last:cut])
        assert INTERNAL not in out
        last = cut
    return out + rewriter.feed(body[last:]) + rewriter.end()


def test_every_split_point_of_an_event_hides_the_id() -> None:
    body = b'data: {"id":"cmpl-' + INTERNAL + b'","x":1}\n\n'
    for cut in range(len(body) + 1):
        assert relayed(body, [cut]) == body.replace(INTERNAL, PUBLIC)


def test_byte_by_byte() -> None:
    body = b"__" + INTERNAL + INTERNAL[:20] + INTERNAL + b"_"
    assert relayed(body, list(range(len(body)))) == body.replace(INTERNAL, PUBLIC)


@given(
    parts=st.lists(st.sampled_from([INTERNAL, INTERNAL[:7], b"_", b"___", b"x", INTERNAL[5:], b"\n"]), max_size=12),
    cuts=st.lists(st.integers(0, 600), max_size=8),
)
def test_any_body_any_reads(parts: list[bytes], cuts: list[int]) -> None:
    body = b"".join(parts)
    assert relayed(body, [min(cut, len(body)) for cut in cuts]) == body.replace(INTERNAL, PUBLIC)


@given(
    events=st.lists(st.sampled_from([INTERNAL, b"x", b"event: y\ndata: z", b""]), min_size=1, max_size=6),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    cuts=st.lists(st.integers(0, 600), max_size=8),
    replaced=st.booleans(),
)
def test_only_whole_events_pass(events: list[bytes], end: bytes, cuts: list[int], replaced: bool) -> None:
    body = b"".join(event + end for event in events) + b"data: par"
    rewriter, out, last = WholeEvents(RequestIdRewriter(ID) if replaced else NoRewriting()), b"", 0
    for cut in (*sorted(min(cut, len(body)) for cut in cuts), len(body)):
        out += rewriter.feed(body[last:cut])
        assert not out or out.endswith(end)
        last = cut
    held = rewriter.end()
    assert held.lstrip(b"\r\n") == b"data: par", "an event that has ended is not held back"
    assert out + held == (body.replace(INTERNAL, PUBLIC) if replaced else body)


def test_what_cannot_be_an_id_is_not_held_back() -> None:
    event = b'data: {"choices":[{"text":" a_b"}]}\n\n'
    assert RequestIdRewriter(ID).feed(event) == event


def test_lengths_stay() -> None:
    assert len(hide(ID, b"<" + INTERNAL + b">")) == len(INTERNAL) + 2
