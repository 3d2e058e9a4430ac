"""A headless Chromium, driven through its DevTools protocol: opens a page, looks, clicks, listens.

with Browser(executable()) as browser:
    browser.open(path.as_uri())
    assert browser.evaluate("document.title") == "..."
    assert browser.complaints == []
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 60  # seconds: for the browser to start, for a page to load


def executable() -> str:
    """The browser's path; without one skips the test, or fails it if one is required."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    message = f"needs a browser: none of {', '.join(NAMES)} is installed"
    if os.environ.get("PAGED_KV_BROWSER") == "required":
        pytest.fail(message)
    pytest.skip(message)


class Browser:
    """One page in a browser of its own, which ends with the block.

    Attributes:
        complaints: what the page has thrown, logged as an error, or failed to load.
        requests: every URL that was asked for, in order.
    """

    def __init__(self, path: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._count = 0
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
                 "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}"]  # fmt: skip
        self._log = Path(self._folder.name) / "stderr"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [path, *flags, "about:blank"],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._open = ExitStack()

    def __enter__(self) -> Browser:
        try:
            connected = connect(self._address(), max_size=None, compression=None)
            self._socket = self._open.enter_context(connected)
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _address(self) -> str:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            text = self._log.read_text(errors="replace")
            if found := re.search(r"DevTools listening on (ws://\S+)", text):
                return found.group(1)
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"the browser does not start: {self._log.read_text(errors='replace')}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer of the page to a DevTools method. Raises RuntimeError if it has an error."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=WAIT))
        what = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(what["request"]["url"])
            case "Network.loadingFailed":
                self.complaints.append(f"not loaded: {what['errorText']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(what["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if what["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(what["args"]))
            case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        return message

    def open(self, url: str) -> None:
        """Loads a page; waits until it and its scripts have run."""
        self._loaded = False
        error = self.call("Page.navigate", url=url).get("errorText")
        assert not error, f"{url}: {error}"
        while not self._loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, as JSON carries it; waits for a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """A key, as a person presses it: Tab, Enter (with text "\\r"), a letter."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        code = {"windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        """Of the window, in CSS pixels; a mobile one also respects the viewport's meta element."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=mobile)  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """What the system would say: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page; written and returned."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        image = base64.b64decode(data["data"])
        path.write_bytes(image)
        return image
