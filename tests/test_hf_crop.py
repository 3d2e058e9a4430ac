"""Back to the context after each question: what crop gives back, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import load, prompt
from hf_questions import CONTEXT, OPTIONS, QUESTIONS, answers, ask, logits, read

from paged_kv.hf import PagedCache

NEVER = ("full", "int4 full")  # drop nothing
EARLY = [name for name in OPTIONS if name not in ("late", "fraction")]


def back(cache: PagedCache) -> None:
    """Crops to the context."""
    cache.crop(len(CONTEXT) - cache.get_seq_length())


@pytest.mark.parametrize("name", EARLY)
def test_twenty_questions_by_crop(name):
    """The context has been compressed; 218 tokens are not enough for the next compaction."""
    model, options = load("llama"), OPTIONS[name]
    with PagedCache(model.config, **options) as context:
        read(model, context)
        cache, before = copy.deepcopy(context), context.stats()
        assert (before.evicted > 0) == (name not in NEVER)
        for seed in range(20):
            question = prompt(2 + seed % 7, seed + 50)
            expected = ask(model, copy.deepcopy(context), question, 8)
            assert ask(model, cache, question, 8) == expected
            back(cache)
            assert cache.stats().entries == before.entries
        # Single tokens, until something is dropped: by what the context has asked, too.
        follow, one = prompt(25, 9), copy.deepcopy(context)
        expected = logits(model, one, follow)
        torch.testing.assert_close(logits(model, cache, follow), expected, atol=1e-5, rtol=1e-5)
        assert (one.stats().evicted > before.evicted) == (name not in NEVER)


@pytest.mark.parametrize("name", ["positions", "scores", "int4"])
def test_crop_leaves_copies_alone(name):
    """One that was made in the middle of an answer shares the pages that crop changes."""
    model, options = load("llama"), OPTIONS[name]
    with PagedCache(model.config, **options) as cache:
        read(model, cache)
        first = ask(model, cache, [5, 6, 7], 4)
        follow = [5, 6, 7, *first[:-1], *QUESTIONS[0]]
        other, third = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = ask(model, other, follow)
        back(cache)
        assert ask(model, third, follow) == expected
        assert ask(model, cache, QUESTIONS[0]) == answers(model, options)[0]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in NEVER])
def test_a_compaction_cannot_be_taken_back(name):
    """Refused, and nothing has changed."""
    model, options = load("llama"), OPTIONS[name]
    with PagedCache(model.config, **options) as cache:
        read(model, cache)
        ask(model, cache, QUESTIONS[1], 20)
        before, other = cache.stats(), copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"a compaction that has seen .*use copy\.deepcopy"):
            back(cache)
        assert cache.stats() == before
        assert cache.get_seq_length() == 251
        more = [*QUESTIONS[1], *QUESTIONS[2]]
        assert ask(model, cache, more) == ask(model, other, more)


@pytest.mark.parametrize(
    ("name", "length", "lost"),
    [("late", 45, "last queries"), ("scores", 15, "scores"), ("int4 full", 60, "residual")],
)
def test_what_a_turn_has_overwritten(name, length, lost):
    """It is back where the turn began, or its answer; elsewhere crop says what is missing."""
    model, options = load("llama"), OPTIONS[name]
    turn = prompt(length, 7)
    with PagedCache(model.config, **options) as context, torch.no_grad():
        read(model, context)
        cache = copy.deepcopy(context)
        for _ in range(2):
            model(torch.tensor([turn]), past_key_values=cache)
            with pytest.raises(ValueError, match=rf"crop\(-14\): the {lost} .*copy\.deepcopy"):
                cache.crop(-14)
            if name != "late":  # there the answer begins with a compaction
                middle = copy.deepcopy(cache)
                expected = logits(model, middle, [7] * 4)
                assert logits(model, cache, [7] * 4).equal(expected)
                cache.crop(-4)
                assert logits(model, cache, [7] * 4).equal(expected)
            back(cache)
        follow = [[5, 6], *([token] for token in prompt(40, 3))]
        for new in follow:
            found, expected = (
                model(torch.tensor([new]), past_key_values=one).logits for one in (cache, context)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert cache.stats().evicted == context.stats().evicted


@pytest.mark.parametrize("name", ["positions", "queries", "spill", "int4"])
def test_crop_to_anywhere(name):
    """Before the next compaction more tokens will come than have gone: no query is missed."""
    model, options = load("llama"), OPTIONS[name]
    with PagedCache(model.config, **options) as cache, torch.no_grad():
        read(model, cache)
        follow = prompt(19, 2)
        logits(model, cache, follow[:6])
        other = copy.deepcopy(cache)
        logits(model, cache, follow[6:])
        cache.crop(-13)
        expected = logits(model, other, prompt(40, 3))
        torch.testing.assert_close(logits(model, cache, prompt(40, 3)), expected)
        assert cache.stats().evicted == other.stats().evicted


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_layers_that_do_not_remember(name):
    """A window that is full, a linear state: transformers cannot crop them, and nothing is."""
    model = load(name)
    with PagedCache(model.config) as cache:
        read(model, cache)
        other = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"cannot go back there: use copy\.deepcopy"):
            cache.crop(-5)
        cache.crop(0)
        assert ask(model, cache, QUESTIONS[0]) == ask(model, other, QUESTIONS[0])
