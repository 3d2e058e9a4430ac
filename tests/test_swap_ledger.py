"""Who has which slot: the oldest makes room, and a request is back when every rank has it."""

from __future__ import annotations

import random
from collections import Counter

import engines  # noqa: F401  vLLM's environment

from paged_kv.vllm.swap.commands import (
    Capacity,
    Demote,
    Finished,
    Forget,
    Load,
    Promote,
    Save,
)
from paged_kv.vllm.swap.ledger import FULL, IO_ERROR, Ledger


def ledger(host: int, file: int = 0, state: int = 0, ranks: int = 1) -> Ledger:
    return Ledger(Capacity(64, host, file, state), ranks)


def pages(count: int, first: int = 0) -> list[dict[int, int]]:
    """Page ids of one layer group by logical index."""
    return [{first + index: 100 + index for index in range(count)}]


def test_who_is_swapped_is_known_after_another_handshake():
    """vLLM 0.33 makes one when an engine wakes up."""
    from paged_kv.vllm.swap.connector import SwapConnector

    connector = SwapConnector.__new__(SwapConnector)
    connector.ledger = None
    ranks = {0: Capacity(64, 10, 0, 0), 1: Capacity(64, 12, 0, 0)}
    connector.set_xfer_handshake_metadata(ranks)
    one = connector.ledger
    assert one.save("a", 70, pages(4))
    connector.set_xfer_handshake_metadata(ranks)
    assert connector.ledger is one
    assert (one.capacity.host_slots, one.num_ranks, [*one.swapped]) == (10, 2, ["a"])
    connector.set_xfer_handshake_metadata({0: Capacity(64, 12, 0, 0)})
    assert (connector.ledger.capacity.host_slots, [*connector.ledger.swapped]) == (12, [])


def test_a_save_names_pages_and_slots_and_a_load_the_same_slots():
    one = ledger(10, state=1)
    assert one.save("a", 70, [{2: 12, 3: 13}, {0: 20}])
    [save] = one.end_step()
    assert isinstance(save, Save)
    assert save.pages.page_ids == ((12, 13), (20,))
    assert [len(some) for some in save.pages.slots] == [2, 1]
    assert len(save.pages.ring_slots) == 1
    one.load("a", [{3: 33}, {0: 40}], 70, 60)  # page 2 is a prefix hit
    assert one.used == (4, 0), "the slots are read in this step"
    [load] = one.end_step()
    assert isinstance(load, Load)
    assert load.pages.page_ids == ((33,), (40,))
    assert load.pages.slots == (save.pages.slots[0][1:], save.pages.slots[1])
    assert load.pages.ring_slots == save.pages.ring_slots
    assert one.used == (0, 0)
    assert one.counts["restored_tokens"] == 60


def test_without_a_file_the_oldest_is_forgotten():
    one = ledger(5)
    for name in "abc":
        assert one.save(name, 64, pages(2))
    assert list(one.swapped) == ["b", "c"]
    assert Forget("a") in one.end_step()
    assert not one.save("d", 999, pages(6)), "larger than all there is"
    assert list(one.swapped) == ["b", "c"]
    assert one.counts[FULL] == 2


def test_the_oldest_goes_to_the_file_and_from_there_it_is_forgotten():
    one = ledger(4, file=4)
    for name in "abcde":
        assert one.save(name, 64, pages(2))
    commands = one.end_step()
    assert [c.request_id for c in commands if isinstance(c, Demote)][:2] == ["a", "b"]
    assert [c.request_id for c in commands if isinstance(c, Forget)] == ["a"]
    assert list(one.swapped) == ["b", "c", "d", "e"]
    assert one.counts[FULL] == 1


def test_a_request_is_back_when_every_rank_has_it():
    one = ledger(4, file=4, ranks=2)
    for name in "abc":
        one.save(name, 64, pages(2))
    one.end_step()
    assert not one.swapped["a"].is_loadable
    assert one.promote("a")
    assert [type(c) for c in one.end_step()][-1] is Promote
    one.finish(Finished({"a": 1}, set()))
    assert not one.swapped["a"].is_loadable
    one.finish(Finished({"a": 1}, set()).aggregate(Finished({}, set())))
    assert one.swapped["a"].is_loadable
    one.promote("b")
    one.finish(Finished({"b": 1}, set()).aggregate(Finished({}, {"b"})))
    assert "b" not in one.swapped
    assert one.counts[IO_ERROR] == 1


def test_no_slot_has_two_owners():
    rng = random.Random(0)
    one = ledger(12, file=20, state=1)
    on_its_way: list[str] = []
    for step in range(3000):
        name = str(step)
        match rng.randrange(4):
            case 0:
                one.save(name, 64, pages(rng.randrange(1, 9)))
            case 1 if one.swapped:
                one.drop(rng.choice(list(one.swapped)))
            case 2 if one.swapped:
                name = rng.choice(list(one.swapped))
                if one.swapped[name].is_loadable:
                    one.load(name, [dict.fromkeys(one.swapped[name].pages[0], 1)], 64, 64)
                elif one.promote(name) and one.swapped[name].is_promoted:
                    on_its_way.append(name)
            case 3 if on_its_way:
                failed = {on_its_way.pop()} if rng.random() < 0.2 else set()
                done = {} if failed else {on_its_way.pop(): 1}
                one.finish(Finished(done, failed))
        one.end_step()
        for part in ("host", "file"):
            owned = Counter(s for other in one.swapped.values() for s in getattr(other, part))
            free = one._host if part == "host" else one._file
            owned.update(free)
            total = one.capacity.host_slots if part == "host" else one.capacity.file_slots
            assert owned == Counter(range(total))
    assert min(one.counts[n] for n in ("swapped_in_requests", FULL, IO_ERROR)) > 10
