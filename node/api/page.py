"""The page at `/`: one file, which asks for nothing from elsewhere and may run nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from fastapi.responses import HTMLResponse

FILE: Final = "page.html"


@dataclass(frozen=True, kw_only=True)
class WebPage:
    """The page's text, and the policy that a browser holds it to."""

    html: str
    policy: str

    @classmethod
    def read(cls) -> WebPage:
        """Read the page from the package, and let its own scripts and styles run, and no others."""
        html = files(__package__).joinpath(FILE).read_text(encoding="utf-8")
        scripts, styles = _hashes("script", html), _hashes("style", html)
        policy = (
            f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return cls(html=html, policy=policy)

    def response(self) -> HTMLResponse:
        """The page with its policy."""
        headers = {
            "Content-Security-Policy": self.policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(self.html, headers=headers)


def _hashes(tag: str, html: str) -> str:
    """What a policy names the page's own scripts or styles by."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
