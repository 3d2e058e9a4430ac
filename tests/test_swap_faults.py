"""What goes wrong with the tiers costs time, never tokens: full, damaged, aborted, thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Tokens, scheduler
from preemption import prompts_of
from swapping import GIB, check_empty, swap, swapping

pytestmark = pytest.mark.vllm

PROMPTS = prompts_of([200] * 6, seed=3)
NUM_TOKENS = 400
POOL = 50  # pages: for two of the six at their full length
FULL = {"policy": "full"}


@pytest.fixture(scope="module")
def expected(tiny: str) -> list[Tokens]:
    """Of a pool for all, where nothing is preempted; and the size of a slot."""
    with swapping(tiny, FULL) as llm:
        outputs = drive(llm)
        assert not scheduler(llm).connector.ledger.counts
    return outputs


@pytest.fixture(scope="module")
def slot_bytes(tiny: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny)
    numbers = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return 32 * numbers * 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap")


@pytest.fixture(scope="module")
def two_tiers(tiny: str, directory: Path, slot_bytes: int, expected: list[Tokens]) -> Iterator[Any]:
    """Memory for two requests (one can come back while another leaves), files for all.

    Made after the engine of expected: a process has one connector.
    """
    tiers = {
        "swap_space": 40 * slot_bytes / GIB,
        "swap_dir": str(directory),
        "swap_dir_space": 150 * slot_bytes / GIB,
    }
    with swapping(tiny, {**FULL, **tiers}, num_pages=POOL) as llm:
        yield llm
    assert not list(directory.iterdir())


def drive(llm: Any, between: Callable[[int], None] = lambda step: None) -> list[Tokens]:
    """Greedy tokens of the prompts; between is called before each step."""
    from vllm import SamplingParams

    assert scheduler(llm).reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    outputs: dict[int, Tokens] = {}
    for step in range(100 * NUM_TOKENS):
        if not llm.llm_engine.has_unfinished_requests():
            break
        between(step)
        for output in llm.llm_engine.step():
            outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
    else:
        pytest.fail("no end in sight")
    return [outputs[index] for index in sorted(outputs)]


def in_file(llm: Any) -> list[str]:
    swapped = scheduler(llm).connector.ledger.swapped
    return [name for name, one in swapped.items() if one.file and not one.host]


def test_what_memory_cannot_hold_waits_in_the_file(two_tiers, expected):
    counts = scheduler(two_tiers).connector.ledger.counts
    assert drive(two_tiers) == expected
    assert counts["demoted_requests"] > 0
    assert counts["promoted_requests"] > 0
    assert not [name for name in counts if name.startswith("fallback")]
    check_empty(two_tiers)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_computed_again(two_tiers, expected, directory, damage):
    counts = scheduler(two_tiers).connector.ledger.counts
    before = counts["fallback_io_error"]
    done: list[str] = []

    def between(step: int) -> None:
        waiting = in_file(two_tiers)
        if not waiting or done:
            return
        tiers = swap(two_tiers).copier.tiers
        one = scheduler(two_tiers).connector.ledger.swapped[waiting[0]]
        place = one.file[1] * tiers.host.shape[1] + 5
        tiers.wait(range(len(tiers.host)))  # for what is on its way
        assert not list(directory.iterdir())
        with open(f"/proc/self/fd/{tiers._file.fd}", "r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1]))
            if damage == "truncate":
                opened.truncate(place)
        done.append(waiting[0])

    assert drive(two_tiers, between) == expected
    assert done
    assert counts["fallback_io_error"] > before
    check_empty(two_tiers)


def test_aborted_while_swapped(two_tiers, expected):
    aborted: set[str] = set()

    def between(step: int) -> None:
        ledger = scheduler(two_tiers).connector.ledger
        some = [name for name, one in ledger.swapped.items() if one.is_loadable] + in_file(
            two_tiers
        )
        if some and len(aborted) < 3:
            [name] = [r for r in map(str, range(6)) if some[-1].startswith(r)]
            two_tiers.llm_engine.abort_request([name])
            aborted.add(name)

    outputs = drive(two_tiers, between)
    assert len(aborted) == 3
    left = [tokens for index, tokens in enumerate(expected) if str(index) not in aborted]
    whole = [tokens for tokens in outputs if len(tokens) == NUM_TOKENS]
    assert whole == left
    check_empty(two_tiers)


def test_after_new_weights_nothing_old_comes_back(two_tiers, expected):
    counts = scheduler(two_tiers).connector.ledger.counts
    before = counts["fallback_reset"]

    def between(step: int) -> None:
        if step == 250:
            reset = {"reset_running_requests": True, "reset_connector": True}
            assert scheduler(two_tiers).reset_prefix_cache(**reset)
            assert not scheduler(two_tiers).connector.ledger.swapped

    assert drive(two_tiers, between) == expected
    assert counts["fallback_reset"] > before
    check_empty(two_tiers)
