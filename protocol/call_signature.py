"""Who makes a call: a signature in its metadata, for one server, one method and one moment, good for one use.

TLS proves the server to the caller and keeps what is said whole and secret; this proves the caller to the server.
"""

from __future__ import annotations

import os
import struct
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from common.errors import IdentityError, OverloadedError, UnauthenticatedError
from protocol.admission import NOT_INVITED, OPEN
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, peer_id_of, verify
from protocol.version import HOW_TO_UPDATE, PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from protocol.admission import Admission
    from protocol.identity import Identity

CALLER_KEY = "kilohive-caller-bin"
TICKET_KEY = "kilohive-ticket-bin"
NONCE_BYTES = 12
MAX_AGE_S = 60.0
"""How far a caller's clock may be off. A nonce is remembered for as long as its signature could be used again."""

MAX_REMEMBERED = 1 << 17
_DOMAIN = b"call/1"
_LAYOUT = struct.Struct(f">B{KEY_BYTES}sQ{NONCE_BYTES}s{SIGNATURE_BYTES}s")
"""Protocol version, public key, milliseconds since 1970, nonce, signature."""


class CallSigner:
    """Signs calls as one caller, who shows a ticket in a closed run; `clock` gives seconds since 1970."""

    def __init__(self, identity: Identity, clock: Callable[[], float] = time.time, admission: Admission = OPEN) -> None:
        self._identity, self._clock = identity, clock
        ticket = admission.ticket(identity.peer_id)
        self._shown = ((TICKET_KEY, ticket),) if ticket else ()

    def metadata(self, server_id: str, method: str) -> tuple[tuple[str, bytes], ...]:
        """Return the signed metadata of one call of `method`, such as /package.Service/Method."""
        time_ms, nonce = int(self._clock() * 1000), os.urandom(NONCE_BYTES)
        signature = self._identity.sign(_DOMAIN, _signed(server_id, method, time_ms, nonce))
        raw = _LAYOUT.pack(PROTOCOL_VERSION, self._identity.public_key, time_ms, nonce, signature)
        return ((CALLER_KEY, raw), *self._shown)


class CallChecker:
    """Checks calls as one server, and remembers those of the last two minutes; `clock` gives seconds since 1970."""

    def __init__(self, server_id: str, clock: Callable[[], float] = time.time, admission: Admission = OPEN) -> None:
        self._server_id, self._clock, self._admission = server_id, clock, admission
        self._used: OrderedDict[bytes, float] = OrderedDict()

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The peer id of the caller.

        Raises:
            UnauthenticatedError: no signature, or one for another server, method or time, or one used before; or the
                run is closed and the caller shows no ticket of its own.
            OverloadedError: more calls came lately than can be remembered.
        """
        metadata = tuple(metadata)
        raw = _value(metadata, CALLER_KEY)
        if len(raw) != _LAYOUT.size:
            raise UnauthenticatedError(f"{CALLER_KEY}: every call must be signed, in {_LAYOUT.size} bytes")
        version, public_key, time_ms, nonce, signature = _LAYOUT.unpack(raw)
        if version != PROTOCOL_VERSION:
            raise UnauthenticatedError(
                f"protocol_version: the caller speaks {version}, this kilohive speaks {PROTOCOL_VERSION}; "
                f"{HOW_TO_UPDATE}"
            )
        self._check_time(time_ms / 1000)
        try:
            verify(public_key, _DOMAIN, _signed(self._server_id, method, time_ms, nonce), signature)
        except IdentityError:
            raise UnauthenticatedError(
                f"{CALLER_KEY}: the signature is not for this call of {self._server_id}"
            ) from None
        caller = peer_id_of(public_key)
        if not self._admission.admits(caller, _value(metadata, TICKET_KEY)):
            raise UnauthenticatedError(NOT_INVITED)
        self._use(public_key + nonce)
        return caller

    def _check_time(self, time_s: float) -> None:
        off_s = self._clock() - time_s
        if abs(off_s) > MAX_AGE_S:
            raise UnauthenticatedError(
                f"{CALLER_KEY}: signed {abs(off_s):.0f} s {'ago' if off_s > 0 else 'ahead'} by this node's clock, "
                f"at most {MAX_AGE_S:.0f} s are allowed; check that both clocks are right"
            )

    def _use(self, what: bytes) -> None:
        now_s = self._clock()
        while self._used and next(iter(self._used.values())) <= now_s:
            self._used.popitem(last=False)
        if what in self._used:
            raise UnauthenticatedError(f"{CALLER_KEY}: this signature was used before")
        if len(self._used) >= MAX_REMEMBERED:
            raise OverloadedError(f"more than {MAX_REMEMBERED} calls in {2 * MAX_AGE_S:.0f} s")
        self._used[what] = now_s + 2 * MAX_AGE_S


def caller_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Who signed a call that a `CallChecker` has let through; None where none has looked at it."""
    raw = _value(metadata, CALLER_KEY)
    if len(raw) != _LAYOUT.size:
        return None
    return peer_id_of(_LAYOUT.unpack(raw)[1])


def _value(metadata: Iterable[tuple[str, str | bytes]], name: str) -> bytes:
    """Return the first entry of that name; empty if there is none, or if it is text."""
    value = next((value for key, value in metadata if key == name), b"")
    return value if isinstance(value, bytes) else b""


def _signed(server_id: str, method: str, time_ms: int, nonce: bytes) -> bytes:
    """Fields in order, each with its length, so that no two calls share a byte string."""
    fields = (server_id.encode(), method.encode(), struct.pack(">Q", time_ms), nonce)
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)
