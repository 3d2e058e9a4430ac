"""What is counted, by name; in Prometheus each is vllm:paged_kv_NAME, counters with _total."""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "vllm:paged_kv"
INTERVAL = 0.5  # seconds between two looks at what has to be added up: pages, bytes


class Metric(NamedTuple):
    """A counter grows; a gauge is how things are.

    Args:
        documentation: a sentence, with the unit.
        labels: beside model_name and engine.
        is_counter: else a gauge.
        scale: what a number in a file is multiplied with.
    """

    documentation: str
    labels: tuple[str, ...] = ()
    is_counter: bool = True
    scale: float = 1.0


_ENTRIES = ("group", "policy")
METRICS = {
    "freed_pages": Metric("Pages that compactions gave back, by layer group.", ("group",)),
    "evicted_entries": Metric("Entries that were dropped, per KV head, all layers.", _ENTRIES),
    "merged_entries": Metric("Entries that were merged into others, per KV head.", _ENTRIES),
    "compactions": Metric("Compactions of a sequence in a layer group.", ("rank",)),
    "compaction_seconds": Metric("Time of compactions, on a GPU its own.", ("rank",), scale=1e-9),
    "fetched_entries": Metric("Entries that came back from a lower tier.", ("rank",)),
    "shrunk_requests": Metric("Requests that shrank to their budgets under pressure."),
    "avoided_preemptions": Metric("Steps in which running requests shrank for lack of pages."),
    "pool_pages": Metric("Pages of the pool.", is_counter=False),
    "free_pages": Metric("Pages that no request holds.", is_counter=False),
    "held_pages": Metric(
        "Pages that running requests hold, by layer group; a shared one once for each.",
        ("group",),
        is_counter=False,
    ),
    "requests_at_budget": Metric("Running requests that have dropped entries.", is_counter=False),
    "bytes": Metric(
        "Bytes in use: of pages, of swapped pages, of spilled entries.",
        ("tier", "use"),
        is_counter=False,
    ),
}
