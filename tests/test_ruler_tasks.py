"""RULER's tasks: as long as asked for, answered by their contexts, the same for the same seed."""

import hashlib
import re
from collections import Counter
from itertools import combinations, pairwise

import pytest
from tokenizers import Tokenizer

from paged_kv.eval.tasks import ruler
from paged_kv.eval.tasks.metrics import METRICS, score
from paged_kv.eval.tasks.ruler_needles import DEPTHS
from paged_kv.eval.tasks.words import ADJECTIVES, NOUNS, VERBS

KEY_OF = {"words": "[a-z]+-[a-z]+", "uuids": "[0-9a-f-]{36}"}
# The first example of each task at 500 words with seed 7: a text must never change unnoticed,
# for results of other versions would no longer be comparable.
HASHES = {
    "niah_single_1": "526c008f668a",
    "niah_single_2": "8e54519a74a3",
    "niah_single_3": "e8ccf1a6c848",
    "niah_multikey_1": "e40ff02ce382",
    "niah_multikey_2": "1fa86bb0f2f4",
    "niah_multikey_3": "7f6a59d4af2a",
    "niah_multivalue": "fee5b393654c",
    "niah_multiquery": "821018445095",
    "vt": "f7bec85811f6",
    "cwe": "f7239bdeff38",
    "fwe": "490187b3ccbd",
}


def count_words(text: str) -> int:
    return len(text.split())


def drawn(task: str, length: int = 500, count: int = 3, seed: int = 0, **options) -> list:
    return list(ruler.examples(task, length, count, seed, count_words, **options))


def whole(example) -> str:
    return example.context + example.question + example.answer_prefix


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [500, 777, 2000, 4500])
def test_as_long_as_asked_for(task, length):
    for example in drawn(task, length, count=2):
        assert 0.95 * length <= count_words(whole(example)) <= length
        assert example.info["length"] == length


@pytest.mark.model
@pytest.mark.parametrize("length", [1024, 2048])
def test_as_long_as_asked_for_in_tokens(smollm2_dir, length):
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    for task in ruler.TASKS:
        for example in ruler.examples(task, length, 1, 0, count):
            assert 0.95 * length <= count(whole(example)) <= length, task


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_context_has_the_answers_and_the_question_does_not(task):
    for example in drawn(task, count=10):
        assert len(set(example.answers)) == len(example.answers)
        for answer in example.answers:
            assert answer in example.context
            assert answer not in example.question + example.answer_prefix
        assert score(", ".join(example.answers), example) == 1
        assert score("nothing", example) == 0
        assert example.metric in METRICS
        assert example.chat


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_same_for_the_same_seed(task):
    some = drawn(task, seed=7)
    assert drawn(task, seed=7) == some
    assert drawn(task, count=1, seed=7) == some[:1], "of more there are the same first"
    assert drawn(task, count=1, seed=8) != some[:1]
    assert len({one.id for one in some}) == len({whole(one) for one in some}) == 3
    assert hashlib.sha256(whole(some[0]).encode()).hexdigest()[:12] == HASHES[task]


@pytest.mark.parametrize("task", [task for task in ruler.TASKS if task.startswith("niah")])
def test_needles_are_found_by_their_key(task):
    """As a reader would: the value that belongs to the key that is asked for."""
    variant = ruler.ruler_needles.TASKS[task]
    for example in drawn(task, 600, count=5):
        keys = re.findall(KEY_OF[variant.keys], example.question)
        assert len(keys) == variant.num_asked
        assert all(key in example.answer_prefix for key in keys)
        pairs = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", example.context)
        values = [value for key, value in pairs if key in keys]
        assert sorted(values) == sorted(example.answers)
        hidden = variant.num_keys + variant.num_values - 1
        assert len(pairs) > 20 if variant.haystack == "needle" else len(pairs) == hidden


def test_a_needle_stands_at_its_depth():
    examples = drawn("niah_single_1", 2000, count=40)
    assert sorted(one.info["depth"] for one in examples) == DEPTHS
    first = [0, *sorted(one.info["depth"] for one in examples[:10]), 100]
    assert max(after - before for before, after in pairwise(first)) < 20, "ten are spread, too"
    assert all(10 < one.info["depth"] < 95 for one in examples[:5]), "few are not at an end"
    for example in examples:
        lines = example.context.split("\n")[1:]
        place = next(place for place, line in enumerate(lines) if "magic" in line)
        assert place == (len(lines) - 1) * example.info["depth"] // 100


def test_depths_are_those_of_ruler():
    assert len(set(DEPTHS)) == 40
    assert (len(DEPTHS), DEPTHS[:3], DEPTHS[-2:]) == (40, [0, 3, 5], [97, 100])


def test_one_and_several():
    one, several = drawn("niah_single_1")[0], drawn("niah_multiquery")[0]
    assert one.context.startswith("A special magic number is hidden within")
    assert one.answer_prefix.endswith(" mentioned in the provided text is")
    assert several.context.startswith("Some special magic numbers are hidden within")
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned", several.question)


def test_a_haystack_of_ones_own(tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text("It rained all day. Nobody came!\nThe cat slept.")
    context = drawn("niah_single_2", haystack=file)[0].context
    text = re.sub(r"One of the special magic .*?\. ", "", context.split("\n")[1])
    assert text.startswith("It rained all day. Nobody came! The cat slept. It rained all day.")
    assert "It rained" not in drawn("niah_single_1", haystack=file)[0].context, "it has noise"


def test_variables_follow_each_other():
    for example in drawn("vt"):
        shot, text = example.context.split("\n\nMemorize")
        for part, answers in ((shot, shot.split("they are: ")[1].split()), (text, example.answers)):
            chain = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", part, re.MULTILINE)
            assert [name for name, _ in chain] == list(answers)
            assert [source for _, source in chain][1:] == list(answers)[:-1]
        assert chain[0][1] in example.question


@pytest.mark.parametrize(("length", "often", "seldom"), [(600, 6, 1), (4500, 30, 3)])
def test_common_words_are_common(length, often, seldom):
    example = drawn("cwe", length)[0]
    text = example.context.rpartition("\n")[2]
    numbers = Counter(re.findall(r"\d+\. (\w+)", text))
    assert {numbers.pop(answer) for answer in example.answers} == {often}
    assert set(numbers.values()) == {seldom}
    shot = Counter(re.findall(r"\d+\. (\w+)", example.context.partition("\nQuestion")[0]))
    assert not set(shot) & (set(numbers) | set(example.answers))


def test_frequent_words_are_frequent():
    for example in drawn("fwe", 500):
        text = example.context.split("coded words. ")[1]
        (dots, first), *others = Counter(text.split()).most_common()
        assert dots == "..."
        assert [word for word, _ in others[:3]] == list(example.answers)
        numbers = [first, *(number for _, number in others)]
        assert numbers[:4] == sorted(set(numbers[:4]), reverse=True), "no two come equally often"
        assert numbers[4] < numbers[3]


def test_no_word_is_inside_another():
    words = ADJECTIVES + NOUNS + VERBS
    assert len(words) > 1000
    assert not [pair for pair in combinations(words, 2) if pair[0] in pair[1] or pair[1] in pair[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "niah"}, "task 'niah' must be one of niah_single_1, .*, vt, cwe, fwe"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"haystack": "none"}, "haystack .*none: no such file"),
        ({"haystack": "empty"}, "haystack .*empty is empty"),
        ({"haystack": "binary"}, "haystack .*binary must be a text in UTF-8"),
        ({"length": 50}, "length 50 is too short for vt, which needs [0-9]+ tokens"),
        ({"task": "cwe", "length": 12000}, "length 12000: cwe comes to [0-9]+ tokens, less than"),
    ],
)
def test_mistakes(tmp_path, change, message):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    options = {"task": "vt", "length": 500, "count": 1, "seed": 0} | change
    if "haystack" in options:
        options["haystack"] = tmp_path / options["haystack"]
    with pytest.raises(ValueError, match=message):
        list(ruler.examples(count_tokens=count_words, **options))
