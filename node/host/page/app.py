"""The server of a host's page: which path gives what, and which does what.

Path of a request: uvicorn -> WithHeaders -> gate -> common.web.request_checks -> **app**.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi.responses import Response  # noqa: TC002 - FastAPI reads the annotation
from pydantic import BaseModel, ConfigDict, Field

from common.web.application import json_answer, web_application
from common.web.event_stream import event_stream
from common.web.files import WithHeaders, file_endpoint, pages_of, static_files, web_file
from common.web.request_checks import CheckConfig, RequestChecks
from node.host.config import ControlConfig
from node.host.control import ask_host
from node.host.owner_pause import MAX_PAUSE_S
from node.host.owner_socket import LIMITS, ask
from node.host.page.gate import PageGate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from common.web.application import Endpoint
    from common.web.feed import Feed
    from common.web.files import WebFile
    from node.host.events import AskedEvent
    from node.host.page.gate import GateConfig

MAX_BODY_BYTES: Final = 4096
HEARD_S: Final = 10.0
"""How long a host may take to hear a word of its owner."""

PAGE: Final = "page.html"


class Strict(BaseModel):
    """What is asked, and nothing besides."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PauseAsked(Strict):
    """`seconds`: how long the pause is to last; null until it is ended."""

    seconds: Annotated[float, Field(ge=1, le=MAX_PAUSE_S, allow_inf_nan=False)] | None = None


class LimitsAsked(Strict):
    """Limits by name, as a person writes them; which there are, and what they may be, the host says."""

    limits: dict[str, str | float | bool]


class NothingAsked(Strict):
    """An action without any choice."""


@dataclass(frozen=True, kw_only=True)
class ShownHost:
    """What endpoints need: the host's folder, the open pages, and `soon`, which has them told at once."""

    folder: Path
    feed: Feed
    soon: Callable[[], None]


def build_app(shown: ShownHost, gate: GateConfig) -> WithHeaders:
    """The application that uvicorn runs."""
    served, endpoints = page_files(), HostEndpoints(shown)
    gets: dict[str, Endpoint] = {"/api/events": endpoints.events, **dict.fromkeys(served, file_endpoint(served))}
    posts: dict[str, Endpoint] = {
        "/api/limits": endpoints.limits,
        "/api/pause": endpoints.pause,
        "/api/resume": endpoints.resume,
        "/api/leave": endpoints.leave,
    }
    checked = RequestChecks(
        web_application(gets, posts), CheckConfig(max_body_bytes=MAX_BODY_BYTES), frozenset({*gets, *posts})
    )
    return WithHeaders(PageGate(checked, gate))


def page_files() -> dict[str, WebFile]:
    """The page and what belongs to it, by the path under which it is served."""
    html = pages_of(__package__).joinpath(PAGE).read_bytes()
    return {"/": web_file(PAGE, html), **static_files(__package__)}


class HostEndpoints:
    """What each path gives or does. An error of the host's, or that none runs, is answered as one sentence."""

    def __init__(self, shown: ShownHost) -> None:
        self._shown = shown

    async def events(self) -> Response:
        """What the host does, again and again."""
        stream = event_stream(self._shown.feed, "host")
        self._shown.soon()
        return stream

    async def limits(self, asked: LimitsAsked) -> Response:
        """Have other limits hold."""
        await ask(self._shown.folder, LIMITS, asked.limits)
        self._shown.soon()
        return _done({})

    async def pause(self, asked: PauseAsked) -> Response:
        """Have the host pause, as `pause` does."""
        return await self._say("pause", asked.seconds)

    async def resume(self, _asked: NothingAsked) -> Response:
        """Have it work again, as `resume` does; what else keeps it from working is told."""
        return await self._say("resume")

    async def leave(self, _asked: NothingAsked) -> Response:
        """Have it hand its blocks over and end, as `leave` does."""
        return await self._say("leave")

    async def _say(self, word: str, duration_s: float | None = None) -> Response:
        config = ControlConfig(state=self._shown.folder, timeout_s=HEARD_S)
        heard: AskedEvent = await ask_host(config, word, duration_s)
        self._shown.soon()
        return _done({"reasons": list(heard.reasons), "until_s": heard.until_s})


def _done(told: dict[str, Any]) -> Response:
    return json_answer(json.dumps(told).encode())
