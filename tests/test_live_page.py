"""GET /kv of a server under load, in a browser: what it shows, and what it keeps to itself."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
import servers
import tiny_models
from browser import Browser, executable
from fastapi import FastAPI

MODEL = "<img src=x onerror=alert(1)>"
SECRET = "t77 t78 t79"  # in every prompt; 77, 78 and 79 to the model
REQUEST_ID = "request-id-of-a-user"
PAGES = 420

POINTS = "document.querySelectorAll('.spark path')[{}].getAttribute('d').match(/[ML]/g).length"
SHOWN = "[...document.querySelectorAll('.groups b')].map(b => Number(b.textContent))"
COLORS = """(() => {
  const canvas = document.querySelector('.pool canvas');
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
})()"""


@pytest.fixture(scope="module")
def stop():
    """Set: no more load."""
    return threading.Event()


@pytest.fixture(scope="module")
def server(tmp_path_factory, stop):
    """Under load until the tests are done."""
    executable()
    folder = tmp_path_factory.mktemp("server")
    model = tiny_models.saved("llama", folder / "model", tokenizer=True)
    line = [servers.VLLM, "serve", model, "--enforce-eager", "--served-model-name", MODEL]
    line += ["--max-model-len", "1024", "--num-gpu-blocks-override", str(PAGES)]
    line += ["--kv-policy", "pyramidal", "--kv-budget", "192", "--api-key", "a-key"]
    variables = servers.environment(folder) | {"VLLM_PLUGINS": "paged_kv,paged_kv_page"}
    server = servers.Server(line, variables, folder / "log")
    load = [threading.Thread(target=_send, args=(server, stop, n)) for n in range(4)]
    try:
        server.wait_until_ready()
        for thread in load:
            thread.start()
        yield server
    finally:
        stop.set()
        server.kill()
        for thread in load:
            thread.join()


def _send(server: servers.Server, stop: threading.Event, number: int) -> None:
    """Requests one after the other; those of a sender begin alike."""
    while not stop.is_set():
        words = " ".join(f"t{30 + number}" for _ in range(350))
        body = {"model": MODEL, "prompt": f"{SECRET} {words}", "max_tokens": 400}
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Bearer a-key",
            "X-Request-Id": f"{REQUEST_ID}-{number}",
        }
        data = json.dumps(body | {"ignore_eos": True}).encode()
        request = urllib.request.Request(server.url + "/v1/completions", data, headers)
        try:
            urllib.request.urlopen(request, timeout=120).read()
        except OSError:
            assert stop.is_set(), server.log.read_text()


@pytest.fixture(scope="module")
def browser():
    with Browser(executable()) as browser:
        yield browser


@pytest.fixture
def opened(browser, server):
    browser.size(1000, 900)
    browser.prefer("light")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(server.url + "/kv")
    _until(browser, "document.querySelectorAll('.requests tbody tr').length > 0")
    yield browser
    assert browser.complaints == []
    asked = {each for each in browser.requests if not each.startswith("data:")}
    assert asked == {server.url + path for path in ("/kv", "/kv/data", "/metrics")}


def _until(browser: Browser, condition: str, seconds: int = 60) -> None:
    """Waits until JavaScript finds that something is so."""
    script = f"""new Promise(done => {{
      const end = performance.now() + {1000 * seconds};
      const look = () => ({condition}) ? done(true)
        : performance.now() > end ? done(false) : setTimeout(look, 100);
      look();
    }})"""
    seen = "" if browser.evaluate(script) else browser.evaluate("document.body.innerText")
    assert not seen, f"never: {condition}\n{seen}"


def _looked(server: servers.Server, **headers: str) -> tuple[bytes, Any]:
    """(body, headers) of /kv/data with a map: there is none before the engine saw who looks."""
    end = time.monotonic() + 60
    while True:
        asked = urllib.request.Request(server.url + "/kv/data", headers=headers)
        with urllib.request.urlopen(asked) as response:
            body, found = response.read(), response.headers
        data = gzip.decompress(body) if found["Content-Encoding"] == "gzip" else body
        if json.loads(data)["engines"][0]["map"] is not None:
            return data, found
        assert time.monotonic() < end, "never a map"
        time.sleep(0.2)


@pytest.mark.vllm
def test_the_pool_its_requests_and_the_sparklines(opened):
    _until(opened, f"{SHOWN}.filter(n => n > 0).length >= 4")
    assert opened.evaluate(f"{SHOWN}.reduce((a, b) => a + b)") == PAGES - 1
    assert opened.evaluate(COLORS) >= 4
    cells = "[...document.querySelector('.requests tbody tr').cells].map(c => c.textContent)"
    number, prompt, tokens, pages, _, _, preempted = opened.evaluate(cells)
    assert number.startswith("#")
    assert (prompt, preempted) == ("353", "0")
    assert 353 <= int(tokens) <= 353 + 400
    assert int(pages) > 0
    bars = "[...document.querySelectorAll('.requests tbody .bar span')].filter(s => s.clientWidth)"
    assert opened.evaluate(f"{bars}.length") >= 3
    _until(opened, f"{POINTS.format(1)} >= 4")
    tokens = "[...document.querySelectorAll('.spark output')][0].textContent"
    _until(opened, f"Number({tokens}) > 0")
    before = opened.evaluate("document.querySelector('.spark path').getAttribute('d')")
    _until(opened, f"document.querySelector('.spark path').getAttribute('d') !== {before!r}")
    assert opened.evaluate("document.getElementById('state').textContent").endswith("at work.")


@pytest.mark.vllm
def test_a_cell_says_what_it_is_by_mouse_and_keyboard(opened):
    text = "document.querySelector('.page').textContent"
    box = opened.evaluate(
        "(() => { const r = document.querySelector('canvas').getBoundingClientRect();"
        "return [r.x, r.y]; })()"
    )
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 5, y=box[1] + 5)
    _until(opened, f"/^Page 1: /.test({text})")
    opened.evaluate("document.querySelector('canvas').focus()")
    for key in ("End", "ArrowLeft"):
        opened.press(key)
    assert opened.evaluate(text).startswith(f"Page {PAGES - 2}: ")
    assert not opened.evaluate("document.querySelector('.mark').hidden")


@pytest.mark.vllm
def test_names_are_text_and_requests_stay_private(opened, server):
    assert opened.evaluate("document.getElementById('model').textContent") == MODEL
    assert opened.evaluate("document.images.length") == 0
    page = opened.evaluate("document.documentElement.outerHTML")
    data = _looked(server)[0].decode()
    assert json.loads(data)["engines"][0]["map"]["running"] > 0
    for text in (page, data):
        assert REQUEST_ID not in text
        assert "t77" not in text
        assert "[77, 78, 79" not in text.replace(",", ", ").replace(",  ", ", ")
        assert "cmpl-" not in text
    assert opened.evaluate("document.cookie + localStorage.length + sessionStorage.length") == "00"


@pytest.mark.vllm
def test_headers_and_compression(opened, server):
    for path in ("/kv", "/kv/data"):
        with urllib.request.urlopen(server.url + path) as response:
            headers = response.headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Set-Cookie" not in headers
    with urllib.request.urlopen(server.url + "/kv") as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    data, headers = _looked(server, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    engine = json.loads(data)["engines"][0]
    assert len(base64.b64decode(engine["map"]["pages"])) == PAGES - 1
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/v1/models")


def _plugins(monkeypatch, names: str | None, tasks: tuple[str, ...] = ("generate",)) -> list[str]:
    """Paths of ours that a server of these plugins and tasks has."""
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if names is not None:
        monkeypatch.setenv("VLLM_PLUGINS", names)
    app = FastAPI()
    attach_endpoint_plugins(app, tasks)
    return [route.path for route in app.routes if route.path.startswith("/kv")]


def test_there_is_no_page_unless_it_is_asked_for(monkeypatch):
    assert _plugins(monkeypatch, None) == []
    assert _plugins(monkeypatch, "paged_kv") == []
    assert _plugins(monkeypatch, "paged_kv,paged_kv_page") == ["/kv", "/kv/data"]
    assert _plugins(monkeypatch, "paged_kv_page", ("render",)) == []


def test_without_a_policy_there_are_no_engines(monkeypatch, tmp_path):
    """Neither before a directory is made, nor before an engine has its file."""
    from fastapi.testclient import TestClient
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from paged_kv.vllm.watch import places
    from paged_kv.vllm.watch.endpoint import PageEndpoint

    plugin = PageEndpoint()
    assert isinstance(plugin, EndpointPlugin)
    app = FastAPI(root_path="/below")
    plugin.attach_router(app)
    client = TestClient(app)
    for directory in ("", str(tmp_path)):
        monkeypatch.setenv(places.VARIABLE, directory)
        assert client.get("/below/kv/data").json() == {"model": "", "engines": []}
    assert "/kv" not in client.get("/openapi.json").text
    assert client.get("/kv").status_code == 200
    assert client.post("/kv").status_code == 405


@pytest.mark.vllm
@pytest.mark.parametrize("width", [320, 390, 820])
def test_it_never_scrolls_sideways(opened, width):
    opened.size(width, 844, mobile=width < 500)
    _until(opened, f"document.documentElement.clientWidth === {width}")
    assert opened.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.vllm
def test_light_and_dark(opened, tmp_path):
    background = "getComputedStyle(document.querySelector('section')).backgroundColor"
    free = "color('--free').join()"
    light = [opened.evaluate(each) for each in (background, free)]
    opened.prefer("dark")
    dark = [opened.evaluate(each) for each in (background, free)]
    assert light == ["rgb(254, 254, 254)", "238,239,241"]
    assert dark == ["rgb(25, 28, 33)", "35,39,45"]
    opened.evaluate("document.getElementById('theme').click()")
    assert opened.evaluate(background) == light[0]


@pytest.mark.vllm
def test_it_says_so_when_the_server_is_gone(browser, server, stop):
    """The last test: it ends the server."""
    browser.open(server.url + "/kv")
    _until(browser, "document.querySelectorAll('.requests tbody tr').length > 0")
    stop.set()
    server.kill()
    _until(browser, "document.getElementById('state').textContent.startsWith('No answer')")
    assert browser.evaluate("document.querySelectorAll('.requests tbody tr').length") > 0
    asked = len(browser.requests)
    browser.evaluate("new Promise(done => setTimeout(done, 2500))")
    assert len(browser.requests) > asked, "it goes on trying"
