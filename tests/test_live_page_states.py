"""The live page where a server has little to say, much, or nothing: its files are a test's."""

from __future__ import annotations

import os
import time

import live_page
import numpy as np
import pytest
from browser import Browser, executable

from paged_kv.vllm.scheduler.page_map import GROUP, KINDS
from paged_kv.vllm.watch import places

STATE = "document.getElementById('state').textContent"
RUNNING = 'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 4.0\n'


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv(places.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    with Browser(executable()) as browser:
        browser.size(1000, 900)
        yield browser


@pytest.fixture
def server(directory):
    with live_page.PageServer() as server:
        yield server


def _opened(browser: Browser, url: str, ready: str) -> Browser:
    """The page, once a condition holds; nothing is complained about."""
    browser.complaints.clear()
    browser.open(url)
    script = f"""new Promise(done => {{
      const look = (left) => ({ready}) || !left ? done(left) : setTimeout(look, 50, left - 1);
      look(300);
    }})"""
    assert browser.evaluate(script), browser.evaluate("document.body.innerText")
    assert browser.complaints == []
    return browser


def test_without_a_policy_it_says_what_is_missing(browser, server):
    _opened(browser, server.url + "/kv", f"{STATE}.includes('--kv-policy')")
    assert browser.evaluate("document.getElementById('engines').children.length") == 0


def test_an_idle_engine_without_a_map(browser, server, directory):
    live_page.write_engine(directory, 0)
    server.metrics = 'vllm:num_requests_running{engine="0"} 0.0\n'
    _opened(browser, server.url + "/kv", f"{STATE}.includes('idle')")
    note = "document.querySelector('.note').textContent"
    assert "map comes with a request" in browser.evaluate(note)
    shown = "[...document.querySelectorAll('canvas, .groups, h3, table')].map(e => e.offsetHeight)"
    assert set(browser.evaluate(shown)) == {0}
    assert places.watched_file(directory).exists()


def test_an_engine_that_hangs(browser, server, directory):
    engine = live_page.write_engine(directory, 0)
    live_page.write_map(engine, [0] * 50, running=7)
    old = time.time() - 40
    os.utime(places.map_file(engine), (old, old))
    server.metrics = RUNNING
    note = "document.querySelector('.note')"
    _opened(browser, server.url + "/kv", f"{note} && !{note}.hidden")
    assert "This map is 4" in browser.evaluate(f"{note}.textContent")


def test_several_engines_have_a_map_each_and_numbers_are_sums(browser, server, directory):
    cells = [0, 1, 2, GROUP + 3, GROUP + 4, GROUP + 5, 6]  # a page of each kind
    for engine in (0, 1, 10):
        live_page.write_map(live_page.write_engine(directory, engine), cells * (engine + 1))
    server.metrics = RUNNING
    ready = "document.querySelectorAll('canvas[tabindex]').length === 3"
    _opened(browser, server.url + "/kv", ready)
    titles = "[...document.querySelectorAll('#engines h2')].map(e => e.textContent)"
    assert browser.evaluate(titles) == [
        f"Pool of engine {engine}: {7 * (engine + 1)} pages, 16 tokens a page"
        for engine in (0, 1, 10)
    ]
    assert browser.evaluate("document.querySelectorAll('.spark output')[1].textContent") == "7"
    legend = "[...document.querySelectorAll('.groups')[1].querySelectorAll('.kinds li')]"
    texts = browser.evaluate(f"{legend}.map(e => e.textContent)")
    assert texts == [
        *["free, in the prefix cache 2", "prompt 2", "survivors 0", "newest 0", "shared 0"],
        *["prompt 0", "survivors 2", "newest 2", "shared 2"],
        *["free 2", "in transit 2"],
    ]


def test_cells_have_the_color_of_what_they_hold(browser, server, directory):
    """And no two kinds, in no two groups, look alike, also where cells are single pixels."""
    codes = [0, 6, *(GROUP * group + kind for group in (0, 1) for kind in range(1, 6))]
    engine = live_page.write_engine(directory, 0)
    for count in (12, 120_000):
        live_page.write_map(engine, (codes * (count // 12)))
        _opened(browser, server.url + "/kv", "document.querySelector('canvas[tabindex]')?.width")
        found = browser.evaluate("""(() => {
          const map = [...engines.values()][0].map, context = map.canvas.getContext('2d');
          return Array.from({length: 12}, (_, page) => {
            const x = page * map.size + Math.floor(map.size / 4);
            const y = Math.max(0, Math.floor(map.size * 0.8) - 1);
            return context.getImageData(x, y, 1, 1).data.join();
          });
        })()""")
        assert len(set(found)) == 12, f"{count} cells: {found}"


def test_half_a_million_pages(browser, server, directory):
    codes = np.random.default_rng(0).integers(0, 8 * len(KINDS), 500_000) % 6
    live_page.write_map(live_page.write_engine(directory, 0), codes)
    _opened(browser, server.url + "/kv", "document.querySelector('canvas[tabindex]')?.width")
    assert browser.evaluate("document.querySelector('canvas').offsetWidth") <= 1000
    text = "document.querySelector('.page').textContent"
    browser.evaluate("document.querySelector('canvas').focus()")
    browser.press("End")
    assert browser.evaluate(text).startswith("Page 500,000: ")


def test_a_pause_asks_for_nothing(browser, server, directory):
    live_page.write_map(live_page.write_engine(directory, 0), [0] * 50)
    _opened(browser, server.url + "/kv", "document.querySelector('canvas[tabindex]')?.width")
    browser.evaluate("document.getElementById('pause').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    asked = len(browser.requests)
    browser.evaluate("new Promise(done => setTimeout(done, 1500))")
    assert len(browser.requests) == asked
    assert browser.evaluate(STATE).startswith("Paused")


def test_below_a_root_path(browser, directory):
    live_page.write_map(live_page.write_engine(directory, 0), [0] * 50)
    with live_page.PageServer(root_path="/below") as server:
        _opened(browser, server.url + "/below/kv", "document.querySelector('canvas')?.width")


def test_what_stands_out_and_what_moves(browser, server, directory):
    """WCAG: 3 for marks beside the surface they lie on, 4.5 for text; no motion where unwanted."""
    requests = [{"number": 1, "prompt": 5, "computed": 9, "pages": [1, 1], "has_dropped": True}]
    requests[0]["preemptions"] = 2
    live_page.write_map(live_page.write_engine(directory, 0), [2, 11], requests=requests, running=1)
    contrast = """(one, other) => {
      const light = (rgb) => rgb.map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const [low, high] = [light(color(one)), light(color(other))].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    }"""
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        _opened(browser, server.url + "/kv", "document.querySelector('.bar span')?.clientWidth")
        for name in ("--ink", "--muted"):
            assert browser.evaluate(f"({contrast})('{name}', '--surface')") >= 4.5, name
        for group in range(7):
            assert browser.evaluate(f"({contrast})('--series-{group}', '--surface')") >= 3, group
    duration = "getComputedStyle(document.querySelector('.bar span')).transitionDuration"
    assert browser.evaluate(duration) == "0.3s"
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    assert browser.evaluate(duration) == "0s"
    browser.prefer("light")
