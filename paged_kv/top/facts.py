"""What the view says of a server: lines of a word and what belongs to it, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from paged_kv.capacity.sizes import show_size
from paged_kv.top.scrape import ours
from paged_kv.top.window import TOKENS_IN, TOKENS_OUT, Window
from paged_kv.top.words import UNKNOWN, count, percent, plain, rate

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
SWAP = "vllm:paged_kv_swap_"
DROPPED = {"evicted": ours("evicted_entries"), "merged": ours("merged_entries")}
_SWAPPED = {
    "out": "out_requests",
    "in": "in_requests",
    "tokens restored": "restored_tokens",
    "to the file": "demoted_requests",
    "from it": "promoted_requests",
}

Facts = tuple[str, list[str]]  # a word, what belongs to it


class Table(NamedTuple):
    """Rows of cells; the first `names` columns are words, the others numbers."""

    columns: list[str]
    rows: list[list[str]]
    names: int = 1


def models(window: Window) -> str:
    """The models' names, as the server gives them."""
    return plain(", ".join(filter(None, window.last.label("model_name", RUNNING))))


def policies(window: Window) -> str:
    """The names of policies that have dropped or may drop entries."""
    names = window.last.label("policy", *DROPPED.values())
    return plain(", ".join(filter(None, names)))


def facts(window: Window) -> Iterator[Facts]:
    """Everything but the pool, layer groups and engines."""
    yield "bytes", _bytes(window)
    yield from _requests(window)
    yield from _tokens(window)
    yield from _compactions(window)
    yield from _swap(window)


def groups(window: Window) -> Table:
    """A row for each layer group: pages held, given back, entries dropped."""
    last, dropped = window.last, _dropped(window)
    held, freed = ours("held_pages"), ours("freed_pages")
    columns = ["group", "policy", "pages held", "given back", "per s"]

    def row(name: str, policy: str, **labels: str) -> list[str]:
        cells = [plain(name), plain(policy), count(last.total(held, **labels))]
        for counter in (freed, *dropped.values()):
            cells += [count(last.total(counter, **labels)), rate(window.rate(counter, **labels))]
        return cells

    rows = []
    for group in last.label("group", held, freed, *DROPPED.values()):
        names = last.label("policy", *DROPPED.values(), group=group)
        # A group without is one that keeps everything.
        rows.append(row(group or UNKNOWN, ", ".join(names) or "full", group=group))
    if len(rows) > 1:
        rows.insert(0, row("all", ""))
    return Table(columns + [c for word in dropped for c in (word, "per s")], rows, names=2)


def engines(window: Window) -> Table:
    """A row for each engine if there are several."""
    last = window.last
    columns = ["engine", "running", "waiting", "at budget", "free", "pages"]
    columns += ["output/s", "preemptions"]
    found = [engine for engine in last.label("engine", RUNNING, ours("pool_pages")) if engine]
    if len(found) < 2:
        return Table(columns, [])
    gauges = (RUNNING, WAITING, *map(ours, ("requests_at_budget", "free_pages", "pool_pages")))
    rows = [
        [
            plain(engine),
            *(count(last.total(name, engine=engine)) for name in gauges),
            rate(window.rate(TOKENS_OUT, engine=engine)),
            count(last.total(PREEMPTIONS, engine=engine)),
        ]
        for engine in found
    ]
    return Table(columns, rows)


def _dropped(window: Window) -> dict[str, str]:
    """Word and metric of what happens to entries here."""
    return {word: name for word, name in DROPPED.items() if window.last.find(name)}


def _bytes(window: Window) -> list[str]:
    name, last = ours("bytes"), window.last
    found = []
    for use in last.label("use", name):
        for tier in last.label("tier", name, use=use):
            size = last.total(name, use=use, tier=tier) or 0.0
            found.append(plain(f"{use} ({tier}) ") + show_size(size))
    return found


def _requests(window: Window) -> Iterator[Facts]:
    last = window.last
    at_budget = last.total(ours("requests_at_budget"))
    shrunk, avoided = ours("shrunk_requests"), ours("avoided_preemptions")
    now = [f"running {count(last.total(RUNNING))}", f"waiting {count(last.total(WAITING))}"]
    yield "requests", now if at_budget is None else [*now, f"at budget {count(at_budget)}"]
    pressure = [_counter(window, "preemptions", PREEMPTIONS)]
    if last.find(shrunk):
        pressure.append(_counter(window, "shrunk", shrunk))
        pressure.append(_counter(window, "avoided preemptions", avoided))
    yield "pressure", pressure


def _tokens(window: Window) -> Iterator[Facts]:
    last = window.last
    yield (
        "tokens",
        [
            f"{word} {rate(window.rate(name))}/s, total {count(last.total(name))}"
            for word, name in (("output", TOKENS_OUT), ("prompts", TOKENS_IN))
        ],
    )
    now = percent(window.rate(HITS), window.rate(QUERIES))
    ever = percent(last.total(HITS), last.total(QUERIES))
    yield "prefix cache", [f"hits {now}", f"since the start {ever}"]


def _compactions(window: Window) -> Iterator[Facts]:
    """Ranks of an engine compact the same sequences, each its heads: all wait for the slowest."""
    number, seconds = ours("compactions"), ours("compaction_seconds")
    ranks: dict[str, list[str]] = {
        engine: window.last.label("rank", number, engine=engine)
        for engine in window.last.label("engine", number)
    }
    if not ranks:
        return
    places = [{"engine": e, "rank": rank} for e, of_engine in ranks.items() for rank in of_engine]
    slowest = max(places, key=lambda place: window.rate(seconds, **place) or 0.0)
    each, spent = window.rate(number, **slowest), window.rate(seconds, **slowest)
    of_first = [window.rate(number, engine=e, rank=names[0]) for e, names in ranks.items()]
    known = [grows for grows in of_first if grows is not None]
    milliseconds = f"{1000 * spent / each:.1f}" if each and spent is not None else UNKNOWN
    found = [f"{rate(sum(known) if known else None)}/s", f"{milliseconds} ms each"]
    found.append(f"{percent(spent, 1.0)} of the time")
    if len(places) > 1 and spent:
        shown = slowest if len(ranks) > 1 else {"rank": slowest["rank"]}
        found.append(plain(f"slowest: {' '.join(chain(*shown.items()))}"))
    yield "compactions", found


def _swap(window: Window) -> Iterator[Facts]:
    last = window.last
    if last.find(f"{SWAP}out_requests_total"):
        yield (
            "swap",
            [_counter(window, word, f"{SWAP}{name}_total") for word, name in _SWAPPED.items()],
        )
        fallbacks = f"{SWAP}fallbacks_total"
        yield (
            "fallbacks",
            [
                _counter(window, plain(reason) or UNKNOWN, fallbacks, reason=reason)
                for reason in last.label("reason", fallbacks)
            ],
        )
    fetched = ours("fetched_entries")
    if last.find(fetched):
        yield "spill", [_counter(window, "entries fetched", fetched)]


def _counter(window: Window, word: str, name: str, **labels: str) -> str:
    """The word, how many since the start, how many per second if any."""
    grows = window.rate(name, **labels)
    total = f"{word} {count(window.last.total(name, **labels))}"
    return f"{total} ({rate(grows)}/s)" if grows else total
