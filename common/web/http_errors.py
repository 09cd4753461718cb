"""Errors as OpenAI's clients know them: a status, an object, and when to try again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi.responses import JSONResponse

from common.errors import (
    DeadlineError,
    DivergedError,
    DrainingError,
    InvalidInputError,
    KilohiveError,
    OverloadedError,
    TooFewExpertsError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

INVALID, UNKNOWN_KEY, OVERLOADED, FAILED = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
HOSTS_AWAY_RETRY_S: Final = 10.0
"""When to ask again where experts have no host: the directory and the peers that are avoided change in seconds."""
BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_MANY, ERROR, UNAVAILABLE, TIMEOUT = 400, 401, 404, 429, 500, 503, 504

_OF_KINDS: Final[dict[type[KilohiveError], tuple[int, str | None, float]]] = {
    InvalidInputError: (BAD_REQUEST, None, 0.0),
    OverloadedError: (TOO_MANY, "queue_full", 0.0),
    TooFewExpertsError: (UNAVAILABLE, "experts_unavailable", HOSTS_AWAY_RETRY_S),
    UnavailableError: (UNAVAILABLE, "experts_unavailable", HOSTS_AWAY_RETRY_S),
    DrainingError: (UNAVAILABLE, "stopping", 1.0),
    DeadlineError: (TIMEOUT, "timeout", 0.0),
    DivergedError: (ERROR, "diverged", 0.0),
}
"""Status, code and when to try again (seconds) for each kind of error."""


@dataclass(frozen=True, kw_only=True)
class HttpError:
    """What is answered in place of what was asked for. `retry_s` is in seconds; 0 says nothing of trying again."""

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    retry_s: float = 0.0

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What else clients go by; OpenAI's own try again after most errors unless they are told not to."""
        if self.retry_s:
            return {"Retry-After": str(math.ceil(self.retry_s))}
        return {"x-should-retry": "false"} if self.status >= ERROR else {}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def http_error(error: KilohiveError) -> HttpError:
    """What a client is told of an error of ours."""
    status, code, retry_s = next(
        (found for kind, found in _OF_KINDS.items() if isinstance(error, kind)), (ERROR, "failed", 0.0)
    )
    return HttpError(
        status=status,
        message=str(error),
        kind={BAD_REQUEST: INVALID, TOO_MANY: OVERLOADED}.get(status, FAILED),
        code=code,
        param=error.field if isinstance(error, InvalidInputError) else None,
        retry_s=error.retry_after_s if isinstance(error, OverloadedError) else retry_s,
    )


def unfit_body(problems: Sequence[Any]) -> HttpError:
    """Of a body that is not what is asked for: the first of pydantic's problems, without the value itself."""
    first = problems[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return HttpError(status=BAD_REQUEST, message="the body is not JSON")
    if not path:
        return HttpError(
            status=BAD_REQUEST, message="the body must be a JSON object, sent with Content-Type: application/json"
        )
    problem = first["msg"][:1].lower() + first["msg"][1:]
    return HttpError(status=BAD_REQUEST, message=f"{'.'.join(path)}: {problem}", param=path[0])
