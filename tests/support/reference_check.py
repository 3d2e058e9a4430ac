"""An engine's output against the reference loop, token by token, as fast as the loop can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from engines import Tokens, complete, recorded_chunks
from reference_loop import Chunk, Rule, Sequence_


@dataclass
class Run:
    """Chunks between which nothing is dropped; the ends of those that sampled a token."""

    start: int
    end: int
    sampled: list[int] = field(default_factory=list)


def merge(
    chunks: list[Chunk], rule: Rule, prompt_len: int, num_tokens: int, held_from: int
) -> Iterator[Run]:
    """The chunks up to the one that samples the last token, in as few runs as possible.

    Args:
        chunks: of a request.
        rule: what each layer drops.
        prompt_len: tokens of its prompt.
        num_tokens: that it samples.
        held_from: tokens before which nothing is dropped.
    """
    num_known, run = prompt_len, None
    for start, end in chunks:
        if num_known == prompt_len + num_tokens:
            break  # an asynchronous scheduler was one step ahead
        if run and (start != run.end or rule.drops_between(run.start, run.end, held_from)):
            yield run
            run = None
        run = run or Run(start, end)
        run.end = end
        if end == num_known:
            run.sampled.append(end)
            num_known += 1
    assert run is not None
    assert num_known == prompt_len + num_tokens, "the chunks do not lead to the last token"
    yield run


FLOAT_NOISE = 3e-5  # of float32 logits, between two orders of the same sums


def check_output(
    sequence: Sequence_, prompt: Tokens, output: Any, chunks: list[Chunk], tolerance: float
) -> str | None:
    """None if each token is the reference's choice after those before it, else what differs.

    Args:
        sequence: the reference, with nothing in it.
        prompt: its tokens.
        output: vLLM's CompletionOutput, with logprobs.
        chunks: the tokens of each step.
        tolerance: how far a token's logprob may be from the reference's. Text that repeats itself
            would hide a lost entry from a look at the tokens alone.
    """
    for index, token, row, error in differences(sequence, prompt, output, chunks):
        # Two tokens this close are one choice: which comes out first depends on the CPU.
        if row.max() - row[token] > FLOAT_NOISE or error > tolerance:
            return f"{describe(index, token, row)}; its logprob is {error:.2e} off"
    return None


def differences(
    sequence: Sequence_, prompt: Tokens, output: Any, chunks: list[Chunk]
) -> Iterator[tuple[int, int, torch.Tensor, float]]:
    """(index, token, the reference's logits there, by how much its logprob differs) of each token.

    Args:
        sequence: see check_output.
        prompt: see check_output.
        output: see check_output.
        chunks: see check_output.
    """
    known = [*prompt, *output.token_ids]
    lengths = len(prompt), len(output.token_ids)
    for run in merge(chunks, sequence.rule, *lengths, sequence.start):
        if run.start != sequence.num_tokens:
            sequence.restart(known[: run.start])
        hidden = sequence.process(known[run.start : run.end])
        sequence.drop()
        logits = sequence.logits(hidden[[end - 1 - run.start for end in run.sampled]])
        for end, row in zip(run.sampled, logits, strict=True):
            index, token = end - len(prompt), known[end]
            logprob = output.logprobs[index][token].logprob
            yield index, token, row, abs(float(row.log_softmax(-1)[token]) - logprob)


def describe(index: int, token: int, logits: torch.Tensor) -> str:
    (best, second), ids = logits.topk(2)
    return (
        f"token {index} is {token}, the reference has {int(ids[0])}; it is "
        f"{best - logits[token]:.2e} behind in logits, the second best {best - second:.2e}"
    )


def complete_and_check(
    llm: Any,
    model: Any,
    prompts: list[Tokens],
    rule: Rule,
    max_tokens: int = 256,
    tolerance: float = 2e-4,  # float32 alone comes to 3e-5; a lost entry to 1e-3 or more
) -> list[list[Chunk]]:
    """All prompts in one batch, each token compared with the reference. Returns the chunks."""
    with recorded_chunks(llm) as recorded:
        outputs = complete(llm, prompts, max_tokens, logprobs=0)
    chunks = list(recorded.values())  # requests are first scheduled in the order of the prompts
    assert len(chunks) == len(prompts)
    found = {}
    for prompt, output, own in zip(prompts, outputs, chunks, strict=True):
        assert len(output.token_ids) == max_tokens
        sequence = Sequence_(model, rule, len(prompt))
        if difference := check_output(sequence, prompt, output, own, tolerance):
            found[f"prompt of {len(prompt)}"] = difference
    assert not found
    return chunks
