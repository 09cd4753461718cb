"""An application of endpoints by path, whose every error is an object with one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from common.errors import KilohiveError
from common.web.http_errors import ERROR, FAILED, HttpError, http_error, unfit_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fastapi import Request

    Endpoint = Callable[..., Awaitable[Response]]


def web_application(gets: Mapping[str, Endpoint], posts: Mapping[str, Endpoint] | None = None) -> FastAPI:
    """Answer GET for the paths of `gets` and POST for those of `posts`, and nothing else."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    for method, endpoints in (("GET", gets), ("POST", posts or {})):
        for path, endpoint in endpoints.items():
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
    handlers: dict[type[Exception], Any] = {
        KilohiveError: _on_error,
        RequestValidationError: _on_unfit_request,
        HTTPException: _on_http_exception,
        Exception: _on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    return app


def json_answer(content: bytes, status: int = 200) -> Response:
    """JSON that no browser keeps."""
    return Response(content, status, {"Cache-Control": "no-store"}, "application/json")


async def _on_error(_request: Request, error: KilohiveError) -> Response:
    return http_error(error).response()


async def _on_unfit_request(_request: Request, error: RequestValidationError) -> Response:
    return unfit_body(error.errors()).response()


async def _on_http_exception(_request: Request, error: HTTPException) -> Response:
    return HttpError(status=error.status_code, message=str(error.detail)).response()


async def _on_bug(_request: Request, _error: Exception) -> Response:
    return HttpError(status=ERROR, message="the server has failed; its log says how", kind=FAILED).response()
