from __future__ import annotations

import grpc
import pytest

from common import errors
from common.errors import (
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidInputError,
    KilohiveError,
    LimitExceededError,
    NotHostedError,
    OverloadedError,
    UnavailableError,
    UnknownRequestError,
    UnknownRunError,
)
from protocol.status import error_from_status, status_of, trailing_metadata_of

CROSSING = [
    (InvalidInputError("layer", "is odd"), grpc.StatusCode.INVALID_ARGUMENT),
    (LimitExceededError("tokens", 9, 8), grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownRunError("run_id", "is unknown"), grpc.StatusCode.NOT_FOUND),
    (NotHostedError("layer", "is elsewhere"), grpc.StatusCode.NOT_FOUND),
    (UnknownRequestError("send the inputs again"), grpc.StatusCode.FAILED_PRECONDITION),
    (OverloadedError("queue full", retry_after_s=0.25), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (DrainingError("leaving"), grpc.StatusCode.UNAVAILABLE),
    (UnavailableError("gone"), grpc.StatusCode.UNAVAILABLE),
    (KilohiveError("a bug"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "status"), CROSSING, ids=lambda value: type(value).__name__)
def test_an_error_crosses_the_wire_with_its_type_and_message(error: KilohiveError, status: grpc.StatusCode) -> None:
    assert status_of(error) is status
    back = error_from_status(status, str(error), dict(trailing_metadata_of(error)))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_field_and_delay_cross_the_wire() -> None:
    invalid, overloaded = CROSSING[0][0], CROSSING[5][0]
    back = error_from_status(grpc.StatusCode.INVALID_ARGUMENT, str(invalid), dict(trailing_metadata_of(invalid)))
    assert isinstance(back, InvalidInputError)
    assert back.field == "layer"
    metadata = dict(trailing_metadata_of(overloaded))
    again = error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, str(overloaded), metadata)
    assert isinstance(again, OverloadedError)
    assert again.retry_after_s == 0.25


@pytest.mark.parametrize("delay", ["", "-5", "1e9", "abc", "9" * 50, "999999999"])
def test_a_hostile_retry_delay_is_bounded(delay: str) -> None:
    metadata = {"kilohive-error": "OverloadedError", "kilohive-retry-after-ms": delay}
    error = error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata)
    assert isinstance(error, OverloadedError)
    assert 0 <= error.retry_after_s <= 60


def test_a_hostile_message_is_cut() -> None:
    assert len(str(error_from_status(grpc.StatusCode.INTERNAL, "x" * 10_000, {}))) == 500
    assert str(error_from_status(grpc.StatusCode.INTERNAL, "\x1b[2Jboo\n", {})) == "?[2Jboo?"


@pytest.mark.parametrize(
    ("status", "message", "wanted"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)", InvalidInputError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", OverloadedError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineError),
        (grpc.StatusCode.UNAVAILABLE, "connection refused", UnavailableError),
        (grpc.StatusCode.UNKNOWN, "?", InternalError),
    ],
)
def test_statuses_that_grpc_itself_sends_get_a_type(
    status: grpc.StatusCode, message: str, wanted: type[KilohiveError]
) -> None:
    assert type(error_from_status(status, message, {})) is wanted


def test_a_peer_cannot_choose_an_error_outside_the_tree() -> None:
    error = error_from_status(grpc.StatusCode.INTERNAL, "boo", {"kilohive-error": "SystemExit"})
    assert type(error) is InternalError


def test_every_error_of_the_module_is_exported_and_drawn_in_the_tree() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, KilohiveError)
    }
    assert defined <= set(errors.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in defined)
