"""A call's signature holds for one server, one method, one moment and one use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import OverloadedError, UnauthenticatedError
from protocol import call_signature
from protocol.admission import Admission
from protocol.call_signature import CALLER_KEY, MAX_AGE_S, TICKET_KEY, CallChecker, CallSigner, caller_of
from protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

CALLER, SERVER, OTHER = (Identity.generate() for _ in range(3))
CLOSED = Admission("demo", bytes(range(32)))
METHOD = "/kilohive.v1.Expert/Forward"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def signed(clock: Callable[[], float], server: Identity = SERVER, method: str = METHOD) -> bytes:
    ((key, raw),) = CallSigner(CALLER, clock).metadata(server.peer_id, method)
    assert key == CALLER_KEY
    return raw


def check(clock: Callable[[], float], raw: bytes | str, checker: CallChecker | None = None) -> str:
    checker = checker or CallChecker(SERVER.peer_id, clock)
    return checker.check(METHOD, (("user-agent", "x"), (CALLER_KEY, raw)))


def test_the_caller_is_known_by_its_signature() -> None:
    clock = Clock()
    assert check(clock, signed(clock)) == CALLER.peer_id


def test_a_signature_for_another_server_or_method_is_refused() -> None:
    clock = Clock()
    for raw in (signed(clock, server=OTHER), signed(clock, method="/kilohive.v1.Expert/Backward")):
        with pytest.raises(UnauthenticatedError, match="not for this call"):
            check(clock, raw)


def test_a_replayed_signature_is_refused_for_as_long_as_it_would_hold() -> None:
    clock = Clock()
    checker, raw = CallChecker(SERVER.peer_id, clock), signed(clock)
    check(clock, raw, checker)
    clock.now_s += MAX_AGE_S
    with pytest.raises(UnauthenticatedError, match="used before"):
        check(clock, raw, checker)
    clock.now_s += 1
    with pytest.raises(UnauthenticatedError, match="signed 61 s ago by this node's clock"):
        check(clock, raw, checker)


def test_a_signature_from_the_future_is_refused_and_forgotten_no_sooner() -> None:
    clock = Clock()
    checker, early = CallChecker(SERVER.peer_id, clock), signed(lambda: clock.now_s + MAX_AGE_S + 1)
    with pytest.raises(UnauthenticatedError, match="61 s ahead"):
        check(clock, early, checker)
    clock.now_s += 1
    check(clock, early, checker)
    clock.now_s += 2 * MAX_AGE_S - 1
    with pytest.raises(UnauthenticatedError, match="used before"):
        check(clock, early, checker)


def test_calls_are_forgotten_when_nobody_can_use_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_signature, "MAX_REMEMBERED", 2)
    clock = Clock()
    checker = CallChecker(SERVER.peer_id, clock)
    for _ in range(2):
        check(clock, signed(clock), checker)
    with pytest.raises(OverloadedError, match="more than 2 calls in 120 s"):
        check(clock, signed(clock), checker)
    clock.now_s += 2 * MAX_AGE_S
    check(clock, signed(clock), checker)


@given(st.data())
def test_no_changed_bit_passes(data: st.DataObject) -> None:
    clock = Clock()
    raw = bytearray(signed(clock))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(UnauthenticatedError):
        check(clock, bytes(raw))


@given(st.one_of(st.binary(max_size=300), st.text(max_size=100)))
def test_anything_else_is_refused(raw: bytes | str) -> None:
    with pytest.raises(UnauthenticatedError):
        check(Clock(), raw)


def test_a_call_without_a_signature_is_refused() -> None:
    with pytest.raises(UnauthenticatedError, match="every call must be signed"):
        CallChecker(SERVER.peer_id).check(METHOD, ())


def test_a_closed_run_takes_a_call_with_its_ticket() -> None:
    clock = Clock()
    checker = CallChecker(SERVER.peer_id, clock, CLOSED)
    metadata = CallSigner(CALLER, clock, CLOSED).metadata(SERVER.peer_id, METHOD)
    assert checker.check(METHOD, metadata) == caller_of(metadata) == CALLER.peer_id


@pytest.mark.parametrize(
    "ticket",
    [(), ((TICKET_KEY, CLOSED.ticket(OTHER.peer_id)),), ((TICKET_KEY, "text"),)],
    ids=["none", "another peer's", "a text"],
)
def test_a_closed_run_refuses_a_call_without_the_callers_ticket(ticket: tuple[tuple[str, bytes], ...]) -> None:
    clock = Clock()
    checker = CallChecker(SERVER.peer_id, clock, CLOSED)
    call = (CALLER_KEY, signed(clock))
    with pytest.raises(UnauthenticatedError, match="admits only those with its invite: join with it"):
        checker.check(METHOD, (call, *ticket))
    shown = (TICKET_KEY, CLOSED.ticket(CALLER.peer_id))
    assert checker.check(METHOD, (call, shown)) == CALLER.peer_id  # what was refused takes no memory


def test_a_ticket_without_a_signature_is_worth_nothing() -> None:
    with pytest.raises(UnauthenticatedError, match="every call must be signed"):
        CallChecker(SERVER.peer_id, admission=CLOSED).check(METHOD, ((TICKET_KEY, CLOSED.ticket(CALLER.peer_id)),))


def test_an_open_run_sends_no_ticket_and_looks_at_none() -> None:
    clock = Clock()
    metadata = CallSigner(CALLER, clock, Admission("demo")).metadata(SERVER.peer_id, METHOD)
    assert [key for key, _ in metadata] == [CALLER_KEY]
    checker = CallChecker(SERVER.peer_id, clock, Admission("demo"))
    assert checker.check(METHOD, (*metadata, (TICKET_KEY, b"x"))) == CALLER.peer_id
