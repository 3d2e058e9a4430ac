"""Answers to prompts: what several cases share changes none of them, and engines agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from reference_loop import load_model

from paged_kv.config import CompressionConfig
from paged_kv.eval import hf_answers, reference_answers
from paged_kv.eval.cases import TRUNCATE, Case, context_of
from paged_kv.eval.prefills import Prefills
from paged_kv.eval.prompt import Prompt
from paged_kv.eval.reference import engine as reference
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.eval.reference_runs import settled

CONTEXT, QUESTION, NEW = 200, 40, 70  # two compactions while the answer is written
POLICIES = ["streaming", "snapkv", "h2o", "lru", "calibrated_attention", "residual", "pooling"]


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 256, (count,), generator=generator).tolist()


def prompt(seed: int, question: int = QUESTION, **more: Any) -> Prompt:
    tokens = random_tokens(CONTEXT + question, seed)
    return Prompt(tokens[:CONTEXT], tokens[CONTEXT:], NEW, **more)


def cases_of(directory: str, *policies: str, budget: int = 96, **options: Any) -> list[Case]:
    model = Path(directory)
    cases = [Case("full", None, CompressionConfig(), model, 32)]
    for policy in policies:
        settings = {"policy": policy, "budget": budget, "compress_prefill": True, **options}
        cases.append(Case(policy, budget, CompressionConfig.from_dict(settings), model, 32))
    return cases


class Bar:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.n = self.total = 0

    def reset(self, total: int) -> None:
        self.total = total

    def update(self, count: int = 1) -> None:
        self.n += count

    def set_description(self, text: str) -> None:
        pass


def answered(run_all: Any, prompts: list[Prompt], cases: list[Case]) -> dict[tuple[int, int], Any]:
    bar = Bar()
    found = {
        (number, index): answer
        for number, index, answer in run_all(prompts, cases, lambda *_: True, bar)
    }
    assert bar.n == bar.total == len(found) == len(prompts) * len(cases)
    return found


def by_hand(model: Any, case: Case, asked: Prompt) -> list[int]:
    """One engine that sees every token, and nothing that others share."""
    (case,) = settled([case], model)
    engine = ReferenceEngine(model, case.config, case.page_size)
    hidden = engine.process(asked.context)
    if asked.question:
        hidden = engine.process(asked.question)
    tokens: list[int] = []
    while len(tokens) < asked.max_new_tokens:
        token = int(engine.logits(hidden[-1:]).argmax())
        if token in asked.stop:
            break
        tokens.append(token)
        hidden = engine.process([token])
    return tokens


# ---- what is shared


def test_cases_that_share_a_context_answer_as_if_alone(tiny):
    model = load_model(tiny)
    cases = cases_of(tiny, *POLICIES)
    found = answered(reference_answers.run_all, [prompt(0), prompt(1, question=0)], cases)
    for (number, index), answer in found.items():
        asked = prompt(number, question=QUESTION * (1 - number))
        assert answer.tokens == by_hand(model, cases[index], asked), cases[index]
        held = cases[index].held(CONTEXT)
        assert (answer.kept, answer.cache_bytes) == (held.kept, held.cache_bytes)
        assert answer.seconds > 0
    assert found[0, 1].kept == 104  # of 200, budget 96: three pages of 32 go


def test_answers_differ_by_policy(tiny):
    """Or the test above compares nothing."""
    cases = cases_of(tiny, *POLICIES)
    found = answered(reference_answers.run_all, [prompt(0)], cases)
    assert len({tuple(answer.tokens) for answer in found.values()}) > len(cases) // 2


def test_an_answer_ends_at_a_stop_token(tiny):
    cases = cases_of(tiny, "streaming")
    free = answered(reference_answers.run_all, [prompt(3)], cases)
    stop = free[0, 0].tokens[5]
    ended = answered(reference_answers.run_all, [prompt(3, stop=frozenset({stop}))], cases)
    for place, answer in free.items():
        length = [*answer.tokens, stop].index(stop)
        assert ended[place].tokens == answer.tokens[:length]


def test_truncation_is_a_shorter_text(tiny):
    case = Case(TRUNCATE, 64, CompressionConfig(), Path(tiny), 32)
    asked = prompt(4)
    assert context_of(case, asked.context) == [*asked.context[:32], *asked.context[-32:]]
    full, cut = cases_of(tiny)[0], asked._replace(context=context_of(case, asked.context))
    found = answered(reference_answers.run_all, [asked], [full, case])
    assert found[0, 1].tokens == by_hand(load_model(tiny), full, cut)
    assert found[0, 1].kept == 64


def test_only_what_is_wanted_is_run(tiny):
    cases, bar = cases_of(tiny, "streaming", "knorm"), Bar()
    wanted = {(1, 0), (1, 2)}
    prompts = [prompt(0), prompt(1)]
    found = reference_answers.run_all(prompts, cases, lambda *place: place in wanted, bar)
    assert {place[:2] for place in found} == wanted
    assert bar.n == bar.total == 6


def test_engines_step_together(tiny):
    """Rows of unlike lengths in one pass, each with its own positions."""
    model = load_model(tiny)
    together, alone = ([ReferenceEngine(model, CompressionConfig()) for _ in "ab"] for _ in "ab")
    for several in (together, alone):
        for engine, length in zip(several, (50, 90), strict=True):
            engine.process(random_tokens(length, length))
    tokens = [random_tokens(3, seed) for seed in (5, 6)]
    hidden = reference.step(together, tokens)
    for row, engine in enumerate(alone):
        torch.testing.assert_close(hidden[row], engine.process(tokens[row]))
    assert [engine.num_tokens for engine in together] == [53, 93]


def test_one_prefill_sums_for_all_that_read_scores(tiny):
    model = load_model(tiny)
    configs = [case.config for case in settled(cases_of(tiny, "h2o", "lru", "knorm")[1:], model)]
    prefills = Prefills(model, prompt(0).context, configs, 32)
    shared = [prefills.compressed(config)[0] for config in configs]
    assert len({id(prefills.of(config).engine) for config in configs}) == 1
    for engine, config in zip(shared, configs, strict=True):
        single = ReferenceEngine(model, config, 32)
        single.process(prompt(0).context)
        for one, other in zip(engine.layers, single.layers, strict=True):
            for name in ("positions", "keys", "scores"):
                pair = one.cache[name], other.cache[name]
                torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)


# ---- engines


@pytest.mark.parametrize("question", [QUESTION, 0])
def test_transformers_answers_alike(tiny, question):
    named = [name for name in POLICIES if name != "calibrated_attention"]
    cases = cases_of(tiny, *named)
    # By itself it leaves out in transformers what attention over native pages tells nobody.
    cases += cases_of(tiny, "calibrated_attention", fading="on")
    cases.append(Case(TRUNCATE, 64, CompressionConfig(), Path(tiny), 32))
    prompts = [prompt(seed, question=question) for seed in (7, 8)]
    ours = answered(reference_answers.run_all, prompts, cases)
    theirs = answered(hf_answers.run_all, prompts, cases)
    for place, answer in ours.items():
        assert theirs[place].tokens == answer.tokens, cases[place[1]]
        assert theirs[place][1:3] == answer[1:3]


@pytest.mark.vllm
def test_vllm_answers_alike(tiny):
    """Several requests at once, in chunks; a stop token."""
    from paged_kv.eval import vllm_answers

    cases = cases_of(tiny, "snapkv", "h2o", "pyramidal+streaming", budget=128)
    stop = frozenset(answered(reference_answers.run_all, [prompt(9)], cases)[0, 0].tokens[40:41])
    prompts = [prompt(seed, question=0, stop=stop) for seed in (9, 10, 11)]
    ours = answered(reference_answers.run_all, prompts, cases)
    with engines.without_collections():
        theirs = answered(vllm_answers.run_all, prompts, cases)
    for place, answer in ours.items():
        assert theirs[place].tokens == answer.tokens, cases[place[1]]
        assert theirs[place][1:3] == answer[1:3]
