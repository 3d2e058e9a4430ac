"""A pass key at each depth of prompts of each length."""

import pytest

from paged_kv.eval.tasks import needle
from paged_kv.eval.tasks.metrics import score


def count_words(text: str) -> int:
    return len(text.split())


def drawn(lengths=(100, 800), depths=(0, 50, 100), facts=2, seed=0, **options) -> list:
    return list(needle.examples(lengths, depths, facts, seed, count_words, **options))


def test_a_cell_for_each_length_and_depth():
    examples = drawn()
    cells = [(one.info["length"], one.info["depth"]) for one in examples]
    assert cells == [(n, depth) for n in (100, 800) for depth in (0, 50, 100) for _ in range(2)]
    assert len({one.id for one in examples}) == len(examples) == 12
    for one in examples:
        words = count_words(one.context + one.question + one.answer_prefix)
        assert 0.95 * one.info["length"] <= words <= one.info["length"]


def test_a_key_stands_at_its_depth():
    for one in drawn():
        (key,) = one.answers
        assert one.context.count(key) == 2
        before, _, after = one.context.partition(needle.NEEDLE.format(key=key))
        num_before, num_after = before.count("."), after.count(".")
        assert num_before == (num_before + num_after) * one.info["depth"] // 100
        assert f"{before.strip()} {after.strip()}".strip() in " ".join([needle.FILLER] * 60)
        assert key not in one.question + one.answer_prefix
        assert score(f" {key}.", one) == 1
        assert score(" 1234", one) == 0


def test_keys_come_from_the_seed():
    def keys(**options):
        return [one.answers for one in drawn(**options)]

    assert drawn() == drawn()
    assert keys(seed=1) != keys()
    assert len(set(keys(lengths=[100], facts=5))) == 15
    assert keys()[:6] == keys()[6:], "a depth has the same keys at every length"
    assert keys(lengths=[100], depths=[50]) == keys()[2:4], "and whatever else is asked for"


def test_a_haystack_of_ones_own(tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text("It rained all day. Nobody came.")
    one = drawn(lengths=[100], depths=[100], haystack=file)[0]
    assert one.context.startswith("It rained all day. Nobody came. It rained all day.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, r"lengths must be numbers of at least 1, not \[\]"),
        ({"lengths": [100, 0]}, r"lengths must be numbers of at least 1, not \[100, 0\]"),
        ({"depths": []}, r"depths must be percentages from 0 to 100, not \[\]"),
        ({"depths": [50, 101]}, r"depths must be percentages from 0 to 100, not \[50, 101\]"),
        ({"facts": 0}, "facts must be at least 1, not 0"),
        ({"lengths": [12]}, "length 12 is too short for needle, which needs 21 tokens"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        drawn(**change)
