"""The live page of a server that is none: the endpoint plugin beside files that a test writes."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Response

from paged_kv.vllm.scheduler.page_map import GROUP, KINDS
from paged_kv.vllm.watch import places, totals
from paged_kv.vllm.watch.endpoint import PageEndpoint


class PageServer:
    """Serves the page from a thread; PAGED_KV_WATCH_DIR must be the directory.

    Attributes:
        metrics: what /metrics says.
    """

    def __init__(self, root_path: str = "") -> None:
        self.metrics = ""
        app = FastAPI(root_path=root_path)
        PageEndpoint().attach_router(app)
        app.add_api_route("/metrics", lambda: Response(self.metrics, media_type="text/plain"))
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> PageServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def write_engine(directory: Path, engine: int, groups: int = 2) -> Path:
    """The file of an engine that has not counted anything."""
    fact = {"policy": "streaming", "layers": 3, "budget": 64}
    facts = {"groups": [fact] * (groups - 1) + [fact | {"budget": None}], "page_size": 16}
    path = places.file_of(directory, engine)
    totals.create(path, [], facts)
    return path


def write_map(engine_file: Path, pages: Any, **more: Any) -> None:
    """A map of these bytes; without requests, unless there are more.

    Args:
        engine_file: of write_engine.
        pages: uint8, see PageMap.snapshot.
        more: of the snapshot.
    """
    encoded = base64.b64encode(np.asarray(pages, np.uint8).tobytes()).decode()
    snapshot = {"kinds": KINDS, "group": GROUP, "pages": encoded, "requests": [], "left_out": 0}
    snapshot |= {"running": 0, "waiting": 0, "interval": 1.0, **more}
    places.map_file(engine_file).write_text(json.dumps(snapshot))
