"""vLLM's endpoint plugin: a live page of what the pools of this server hold, GET /kv.

vLLM loads it only where its name is asked for:

    VLLM_PLUGINS=paged_kv,paged_kv_page vllm serve ...

The page is one file that loads nothing and sets nothing; its script asks for /kv/data and for
vLLM's /metrics, once a second. Neither has anything of what requests say, nor their ids.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from paged_kv.vllm.watch import places, totals

HERE = Path(__file__).parent
STYLES = (HERE.parents[1] / "looks.css", HERE / "page.css")
SCRIPTS = ("page_map.js", "page_requests.js", "page_metrics.js", "page.js")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PageEndpoint:
    """What vLLM's protocol for endpoint plugins asks for."""

    name = "paged_kv_page"
    required_tasks = ("generate",)  # a policy is for nothing else, and a render server has no pool

    def __init__(self) -> None:
        self._page, policy = _page()
        self._headers = {**_HEADERS, "Content-Security-Policy": policy}
        self._model = ""

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; what they read from files they read in threads."""
        for path, answer in (("/kv", self._get_page), ("/kv/data", self._get_data)):
            app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The server has its engine: what its model is called, also in its metrics."""
        self._model = str(engine_client.model_config.served_model_name)

    def _get_page(self) -> Response:
        return Response(self._page, media_type="text/html", headers=self._headers)

    def _get_data(self, request: Request) -> Response:
        """JSON: model, and engines (none without a policy), each with its number, its facts, its
        map and how old that is in seconds; the last two are null until there is a map.
        """
        engines = ", ".join(_engines(places.directory()))
        text = f'{{"model": {json.dumps(self._model)}, "engines": [{engines}]}}'
        headers = {**_HEADERS, "Vary": "Accept-Encoding"}
        data = text.encode()
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            data = gzip.compress(data, 1)
        return Response(data, media_type="application/json", headers=headers)


def _page() -> tuple[str, str]:
    """The page, and what it may load and run: what it brings along, and this server's answers."""
    css = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    js = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (HERE / "page.html").read_text(encoding="utf-8")
    page = page.replace("{{ css }}", css).replace("{{ js }}", js)
    policy = {
        "default-src": "'none'",
        "style-src": f"'{_hash(css)}'",
        "script-src": f"'{_hash(js)}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _engines(directory: Path | None) -> Iterator[str]:
    """JSON of each engine. Tells the engines that somebody looks."""
    if directory is None:
        return
    places.watched_file(directory).touch()
    for number, path in places.engine_files(directory).items():
        try:
            facts = json.dumps(totals.read(path).facts)
        except OSError:
            continue
        text, age = "null", "null"
        try:
            with places.map_file(path).open(encoding="utf-8") as file:
                age = f"{max(0.0, time.time() - os.fstat(file.fileno()).st_mtime):.3f}"
                text = file.read()
        except FileNotFoundError:
            pass
        yield f'{{"engine": {number}, "facts": {facts}, "age": {age}, "map": {text}}}'
