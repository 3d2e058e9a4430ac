"""The view of `paged-kv top`, from texts whose numbers were chosen; rates computed by hand."""

from __future__ import annotations

import io

import pytest
from metric_texts import group, line, ours, rank, swap, vllm
from rich.console import Console

from paged_kv.top.scrape import parse
from paged_kv.top.view import View
from paged_kv.top.window import POINTS, Window
from paged_kv.top.words import flow, plain, rate, spark

URL = "http://host:8000/metrics"


def window(*texts: str, engine: str | None = None, seconds: float = 4.0) -> Window:
    """What is known after these texts, so many seconds apart."""
    known = Window(engine)
    for number, text in enumerate(texts):
        known.add(parse(text, 100 + number * seconds))
    return known


def draw(known: Window, width: int = 80, height: int = 24, live: bool = False, problem="") -> str:
    """What a terminal without colours shows; markup is on, as a trap."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(View(URL, known, problem, live))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


# Four seconds apart.
BEFORE = (
    vllm(
        num_preemptions_total=1,
        prompt_tokens_total=1000,
        generation_tokens_total=500,
        prefix_cache_queries_total=1000,
    )
    + ours(pool_pages=100, free_pages=50, requests_at_budget=0)
    + ours(shrunk_requests_total=3, avoided_preemptions_total=1)
    + group("0", 20, 40, 4000)
    + group("1", 30, 60, 6000)
    + rank("0", 10, 0.5)
    + swap(0, 2)
)
AFTER = (
    vllm(
        num_requests_running=3,
        num_requests_waiting=7,
        num_preemptions_total=3,
        prompt_tokens_total=1800,
        generation_tokens_total=900,
        prefix_cache_hits_total=200,
        prefix_cache_queries_total=1800,
    )
    + ours(pool_pages=100, free_pages=25, requests_at_budget=2)
    + ours(shrunk_requests_total=3, avoided_preemptions_total=5)
    + group("0", 45, 60, 6000)
    + group("1", 30, 100, 10000)
    + rank("0", 30, 0.7)
    + swap(3, 2)
)
VIEW = """\
paged-kv top  tiny  pyramidal
http://host:8000/metrics   rates of the last 4 s
pool          ████████████████████░░░░░░░  75 of 100 pages held, 25 free (25.0%)
bytes         pages (device) 3 MiB   swap (host) 1.50 MiB
requests      running 3   waiting 7   at budget 2
pressure      preemptions 3 (0.5/s)   shrunk 3   avoided preemptions 5 (1.0/s)
tokens        output 100/s, total 900   prompts 200/s, total 1,800
prefix cache  hits 25.0%   since the start 11.1%
compactions   5.0/s   10.0 ms each   5.0% of the time
swap          out 3 (0.8/s)   in 0   tokens restored 0   to the file 0
              from it 0
fallbacks     full 2   stale 0
group  policy     pages held  given back  per s  evicted  per s
all                       75         160   15.0   16,000  1,500
0      pyramidal          45          60    5.0    6,000    500
1      pyramidal          30         100   10.0   10,000  1,000"""


def test_a_view_of_chosen_numbers():
    assert draw(window(BEFORE, AFTER)) == VIEW


def test_rates_need_two_scrapes():
    shown = draw(window(AFTER))
    assert "output -/s, total 900" in shown
    assert "-/s   - ms each   - of the time" in shown
    assert "hits -   since the start 11.1%" in shown
    assert "1      pyramidal          30         100      -   10,000      -" in shown


def test_rates_are_means_over_the_last_ten_seconds():
    known = window(*(vllm(generation_tokens_total=n) for n in (0, 500, 600, 700, 800)))
    assert known.seconds == 12  # of intervals of four
    assert known.rate("vllm:generation_tokens_total") == pytest.approx(300 / 12)
    assert list(known.tokens) == [125, 25, 25, 25]
    slow = window(vllm(), vllm(generation_tokens_total=90), vllm(), seconds=30.0)
    assert slow.seconds == 0, "counters fell"
    slow.add(parse(vllm(generation_tokens_total=60), 190.0))
    assert slow.rate("vllm:generation_tokens_total") == 2


def test_a_server_that_was_restarted():
    """Nothing is known of the time between; after another scrape there are rates again."""
    known = window(BEFORE, AFTER, BEFORE)
    shown = draw(known)
    assert f"restarted before {known.restarted}" in shown
    assert "output -/s, total 500" in shown
    known.add(parse(AFTER, 112))
    assert "output 100/s, total 900" in draw(known)


def test_engines_and_ranks():
    """Sums, a line for each engine; of compactions the slowest rank, for ranks count the same."""

    def text(number: int) -> str:
        return (
            vllm("0", generation_tokens_total=100 * number, num_requests_running=1)
            + vllm("1", generation_tokens_total=300 * number, num_requests_running=2)
            + ours("0", pool_pages=10, free_pages=4)
            + ours("1", pool_pages=10, free_pages=1)
            + group("0", 6, 10 * number, 0)
            + group("0", 9, 30 * number, 0, engine="1")
            + rank("0", 20 * number, 0.1 * number)
            + rank("1", 20 * number, 0.4 * number)
            + rank("0", 10 * number, 0.2 * number, "1")
        )

    known = window(text(1), text(2), seconds=1.0)
    lines = draw(known).splitlines()
    assert "requests      running 3   waiting 0" in lines
    place = lines.index("compactions   30.0/s   20.0 ms each   40.0% of the time")
    assert lines[place + 1] == "              slowest: engine 0 rank 1"
    rows = [line.split() for line in lines]
    assert ["0", "1", "0", "-", "4", "10", "100", "0"] in rows
    assert ["1", "2", "0", "-", "1", "10", "300", "0"] in rows
    assert ["0", "pyramidal", "15", "80", "40.0", "0", "0.0"] in rows
    shown = draw(window(text(1), text(2), engine="0", seconds=1.0))
    assert "compactions   20.0/s   20.0 ms each   40.0% of the time   slowest: rank 1" in shown
    assert "slowest" not in draw(window(text(1), text(1)))
    lines = draw(window(text(1), text(2), engine="1", seconds=1.0)).splitlines()
    assert "tokens        output 300/s, total 600   prompts 0.0/s, total 0" in lines
    assert "compactions   10.0/s   20.0 ms each   20.0% of the time" in lines  # one rank
    assert not any(line.startswith("engine") for line in lines)
    with pytest.raises(ValueError, match="--engine must be one of 0, 1 here, not 2"):
        window(text(1), engine="2")


def test_names_are_text():
    """What could steer a terminal is gone; rich's markup is what it looks like."""
    name = "[bold red]x[/][link=http://a]\x1b[31mred\x1b]0;t\x07\u202eback\u2028\x9b1m:boom:"
    text = vllm(model=name) + group(name, 1, 1, 1, policy=name)
    text += line("paged_kv_bytes", 1, engine=name, tier=name, use=name)
    text += line("paged_kv_swap_out_requests_total", 1, engine=name)
    text += line("paged_kv_swap_fallbacks_total", 1, engine=name, reason=name)
    text += rank(name, 1, 1.0) + rank("2", 1, 1.0) + vllm(engine=name) + ours(pool_pages=1)
    shown = draw(window(text, text), width=500, live=True, problem=plain(name))
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.count("[bold red]x[/][link=http://a][31mred]0;tback 1m:boom:") >= 8


def test_labels_that_are_missing():
    text = "vllm:num_requests_running 2\nvllm:paged_kv_pool_pages 4\nvllm:paged_kv_free_pages 4\n"
    text += "vllm:paged_kv_held_pages 1\nvllm:paged_kv_compactions_total 4\n"
    text += "vllm:paged_kv_compaction_seconds_total 0.5\nvllm:paged_kv_bytes 7\n"
    later = text.replace(" 0.5", " 0.7").replace("_total 4", "_total 8")
    lines = draw(window(text, later)).splitlines()
    assert "requests      running 2   waiting -" in lines
    assert "compactions   1.0/s   50.0 ms each   5.0% of the time" in lines
    assert "-      full             1           -      -" in lines


def test_merging_and_groups_without_a_policy():
    text = vllm() + group("1", 2, 3, 4, dropped="merged", policy="pooling")
    text += line("paged_kv_held_pages", 9, engine="0", model_name="tiny", group="0")
    lines = draw(window(text, text)).splitlines()
    assert "group  policy   pages held  given back  per s  merged  per s" in lines
    assert "0      full              9           -      -       -      -" in lines
    assert "1      pooling           2           3    0.0       4    0.0" in lines


def test_what_spilled():
    fetched = "paged_kv_fetched_entries_total"
    texts = [BEFORE + line(fetched, n, engine="0", rank="0") for n in (0, 8)]
    assert "spill         entries fetched 8 (2.0/s)" in draw(window(*texts)).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (130, 40), (80, 18), (30, 10), (5, 2)])
def test_the_live_view_fits(width, height):
    """Tables end with how many rows there is no room for; layer groups have room beside engines."""
    text = BEFORE + "".join(group(str(n), 1, 1, 1) for n in range(2, 30))
    text += "".join(vllm(str(n)) for n in range(1, 16))
    shown = draw(window(text, text, text), width, height, live=True).splitlines()
    assert max(map(len, shown)) <= width
    if (width, height) == (80, 24):
        assert len(shown) == 24
        assert shown[11].split() == ["output/s", "▁▁", "highest", "0.0"]
        assert shown[12].split() == ["free", "pages", "███", "highest", "50"]
        assert [line.split()[:2] for line in shown if "more" in line] == [
            ["+10", "more"],  # of 16; seven rows after twelve lines and a head: three are kept free
            ["+30", "more"],  # after `all`
        ]


def test_curves_hold_what_a_wide_terminal_shows():
    known = window(*(vllm(generation_tokens_total=n) for n in range(POINTS + 50)))
    assert len(known.tokens) == POINTS


def test_a_server_without_a_policy():
    shown = draw(window(vllm(num_requests_running=1), vllm(num_requests_running=2)))
    assert "no metrics of paged_kv: a server without --kv-policy" in shown
    assert "requests      running 2   waiting 0\n" in shown
    assert "pool" not in shown
    assert "group" not in shown


def test_what_is_read():
    """Of vLLM only, and only numbers; not when a series began."""
    text = 'vllm:a_total{b="c"} 1\nvllm:a_created{b="c"} 2\nother 3\n# HELP x y\nvllm:d NaN\n'
    scrape = parse(text + "vllm:e +Inf\nvllm:f_bucket 3\n", 1.0)
    assert [(s.name, s.labels, v) for s, v in scrape.values.items()] == [
        ("vllm:a_total", (("b", "c"),), 1.0)
    ]
    assert not scrape.has_policy
    assert parse("", 1.0).values == {}
    with pytest.raises(ValueError, match="invalid metric name"):
        parse("<html><body>no metrics</body></html>", 1.0)


def test_words():
    assert [rate(n) for n in (None, 0.0, 0.04, 99.94, 100.0, 12345.6)] == [
        "-", "0.0", "0.0", "99.9", "100", "12,346",
    ]  # fmt: skip
    assert spark([0, 1, 2, 4, 8], 3) == "▃▅█"  # of 8: 0.25 x 7 = 1.75, 3.5 to the even 4, 7
    assert spark([], 5) == ""
    assert spark([0, 0], 5) == "▁▁"
    assert flow(["aa", "bb", "cc"], 7) == ["aa   bb", "cc"]
    assert flow(["longer than the line", "b"], 4) == ["longer than the line", "b"]
    assert flow([], 4) == []
