"""The chat page at `/`: one file, sent with a policy that lets it reach this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

_FILE = Path(__file__).with_name("chat_page.html")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def chat_page() -> Response:
    """The page. Its policy (https://www.w3.org/TR/CSP3/) names its script and its styles by their hashes."""
    content = _FILE.read_text(encoding="utf-8")
    hashes = {kind: _hash(text) for kind, text in _INLINE.findall(content)}
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
    }
    return Response(content, media_type="text/html", headers=headers)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
