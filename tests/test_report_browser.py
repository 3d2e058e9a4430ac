"""The page of `paged-kv report` in a browser: it runs, sorts, filters, fits, and loads nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_rows
from browser import Browser, executable

from paged_kv import cli, results

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COLUMN = "[...document.querySelectorAll('#tables table')[{}].rows].slice(1).map(r => {})"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long = "pyramidal+expected_attention_of_a_plugin_with_a_long_name"
    rows = report_rows.realistic(["snapkv", "streaming", long], budgets=(64, 256))
    rows.append(report_rows.row("ruler", "<script>boom()</script>", 64, 0.5, subtask="niah_single"))
    results = report_rows.write(folder / "rows.jsonl", rows)
    assert cli.main(["report", str(results), "--out", str(folder / "report.html")]) == 0
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with Browser(executable()) as browser:
        yield browser


@pytest.fixture
def opened(browser, url):
    browser.size(1280, 900)
    browser.prefer("light")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(url)
    yield browser
    assert browser.complaints == []
    # Charts' color bars are pictures inside the page.
    assert {each for each in browser.requests if not each.startswith("data:")} == {url}


def column(browser, table: int, cell: str) -> list:
    return browser.evaluate(COLUMN.format(table, cell))


def test_complaints_are_heard(browser, url):
    """Of a page that has them: else their absence would mean nothing."""
    browser.open(url)
    browser.complaints.clear()
    browser.evaluate("console.error('one'); setTimeout(() => { throw Error('two') })")
    browser.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://x.invalid/'}))")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("one" in each for each in browser.complaints)
    assert any("two" in each for each in browser.complaints)
    assert any("Content Security Policy" in each for each in browser.complaints)
    browser.complaints.clear()


def test_a_heading_sorts_both_ways_by_mouse_and_keyboard(opened):
    heading = "document.querySelectorAll('#tables table')[0].querySelectorAll('th button')[{}]"
    sorting = "[...document.querySelectorAll('#tables table')[0].querySelectorAll('th')]"
    sorting += ".map(th => th.getAttribute('aria-sort')).filter(value => value != 'none')"
    budget = "r.cells[1].textContent"
    assert opened.evaluate(sorting) == []
    opened.evaluate(heading.format(1) + ".click()")
    assert opened.evaluate(sorting) == ["ascending"]
    assert column(opened, 0, budget) == ["64"] * 3 + ["256"] * 3 + ["all"]
    opened.evaluate(heading.format(1) + ".focus()")
    opened.press("Enter", "\r")
    assert opened.evaluate(sorting) == ["descending"]
    assert column(opened, 0, budget) == ["all"] + ["256"] * 3 + ["64"] * 3
    opened.evaluate(heading.format(0) + ".click()")
    assert opened.evaluate(sorting) == ["ascending"]
    names = column(opened, 0, "r.cells[0].textContent")
    assert names == sorted(names)
    assert names[0] == "full"


def test_what_has_no_value_is_last_both_ways(opened):
    table = "document.querySelector('#summary table')"
    values = f"[...{table}.tBodies[0].rows].map(r => r.cells[2].textContent)"
    found = []
    for _ in range(2):
        opened.evaluate(f"{table}.querySelectorAll('th button')[2].click()")
        *shares, none = opened.evaluate(values)
        assert none == "–"
        found.append([float(share.split()[0]) for share in shares])
    assert found[0] == sorted(found[1])
    assert found[1] == found[0][::-1]


def test_the_filter_takes_rows_that_have_all_words(opened):
    opened.evaluate("document.getElementById('filter').focus()")
    for letter in "SNAP 256":
        opened.press(letter, letter)
    hidden = column(opened, 0, "[r.hidden, r.cells[0].textContent, r.cells[1].textContent]")
    assert [rest for hide, *rest in hidden if not hide] == [["snapkv", "256"]]
    assert opened.evaluate("document.getElementById('shown').textContent").endswith(" rows")


def test_a_name_is_text(opened):
    assert opened.evaluate("document.scripts.length") == 1
    assert opened.evaluate("document.body.textContent.includes('<script>boom()')")


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_the_page_never_scrolls_sideways(opened, url, width):
    opened.size(width, 844, mobile=width < 500)
    opened.open(url)
    for opening in (
        "",
        "for (const each of document.querySelectorAll('details')) each.open = true",
    ):
        opened.evaluate(opening)
        assert opened.evaluate("document.documentElement.scrollWidth") == width
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert opened.evaluate(f"{wide}.length > 0")


def test_what_is_published_makes_a_page_that_fits(browser, tmp_path):
    """All of benchmarks/results: hundreds of curves and thousands of rows, on a phone."""
    out, files = tmp_path / "report.html", sorted(RESULTS.glob("*.jsonl"))
    assert cli.main(["report", *map(str, files), "--out", str(out)]) == 0
    tasks = {row["task"].partition(":")[0] for row in results.read(files)}
    browser.size(390, 844, mobile=True)
    browser.complaints.clear()
    browser.open(out.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.evaluate("document.querySelectorAll('#tables table').length") == len(tasks) > 5
    assert browser.complaints == []


def test_light_and_dark_by_the_system_and_by_the_button(opened, tmp_path):
    background = "getComputedStyle(document.querySelector('section')).backgroundColor"
    ink = "getComputedStyle([...document.querySelectorAll('svg text')].at(-1)).fill"
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    light = [opened.evaluate(each) for each in (background, ink, pressed)]
    pictures = [opened.screenshot(tmp_path / "light.png")]
    opened.prefer("dark")
    dark = [opened.evaluate(each) for each in (background, ink, pressed)]
    pictures.append(opened.screenshot(tmp_path / "dark.png"))
    assert light == ["rgb(254, 254, 254)", "rgb(31, 35, 40)", "false"]
    assert dark == ["rgb(25, 28, 33)", "rgb(232, 234, 237)", "true"]
    assert pictures[0] != pictures[1]
    opened.evaluate("document.getElementById('theme').click()")
    assert [opened.evaluate(each) for each in (background, ink, pressed)] == light
    assert opened.evaluate("document.cookie + localStorage.length + sessionStorage.length") == "00"


def test_text_stands_out_in_both_schemes(opened):
    """WCAG's contrast: 4.5 for text, 3 for curves."""
    contrast = """(() => {
      const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = (name) => {
        const probe = document.body.appendChild(document.createElement('i'));
        probe.style.color = `var(${name})`;
        const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number).map(channel);
        probe.remove();
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
      };
      const names = ['--ink', '--muted', '--link', '--full',
                     ...[0, 1, 2, 3, 4, 5, 6].map((n) => `--series-${n}`)];
      const ratio = (a, b) => Math.max(a, b) / Math.min(a, b);
      return names.map((name) => [name, ratio(light(name), light('--surface'))]);
    })()"""
    for scheme in ("light", "dark"):
        opened.prefer(scheme)
        for name, ratio in opened.evaluate(contrast):
            assert ratio >= (3 if name.startswith("--series") or name == "--full" else 4.5), name


def test_without_a_browser(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PAGED_KV_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="none of chromium, "):
        executable()
    monkeypatch.setenv("PAGED_KV_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="none of chromium, "):
        executable()
