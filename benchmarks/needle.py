"""Is a fact found in a long prompt, with a budget that it does not fit in?

A pass key stands at each of --depths (percent) of a prompt of --tokens tokens of filler; the prompt
ends with the question. Each case is asked for --facts different keys, and has found one if all
tokens of its answer are right. streaming compresses at the prompt's end (in vLLM the first token of
the answer still sees everything), snapkv and h2o after every chunk: at the end they would know the
question. What was dropped before is lost, unless it was spilled.
"""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import DEFAULT_PAGE_SIZE

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"
ANSWER = " {key}"
SPILL = "+spill"
CASES = ("full", "streaming", "streaming+spill", "snapkv", "snapkv+spill", "h2o", "h2o+spill")

Answer = Callable[[list[int], int], list[int]]  # (prompt, new tokens) -> the new tokens


def main(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    asked = list(prompts(args, tokenizer))
    answers = {"hf": in_transformers, "vllm": in_vllm}[args.engine]
    with tqdm(total=len(args.cases) * len(asked), unit="prompt") as bar:
        for case in args.cases:
            found = dict.fromkeys(args.depths, 0)
            answer, close = answers(args, options(args, case))
            for depth, prompt, expected in asked:
                found[depth] += answer(prompt, len(expected)) == expected
                bar.update()
            close()
            result = {"case": case, "found": sum(found.values()), "asked": len(asked)}
            script.emit("needle", args, {**result, "by_depth": found})


def prompts(args: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[int, list[int], list[int]]]:
    """(depth, prompt, the tokens of the right answer) of every depth and key."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    filler = encode(FILLER * (1 + args.tokens // len(encode(FILLER))))
    generator = random.Random(args.seed)
    for depth in args.depths:
        for _ in range(args.facts):
            key = generator.randrange(10000, 100000)
            needle, question = encode(NEEDLE.format(key=key)), encode(QUESTION)
            room = args.tokens - len(needle) - len(question)
            if room < 1:
                least = len(needle) + len(question) + 1
                raise ValueError(f"--tokens must be at least {least}, not {args.tokens}")
            before = room * depth // 100
            prompt = filler[:before] + needle + filler[before:room] + question
            yield depth, prompt, encode(ANSWER.format(key=key))


def options(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Of a policy."""
    policy = case.removesuffix(SPILL)
    if policy == "full":
        return {"policy": policy}
    own: dict[str, Any] = {"policy": policy, "budget": args.budget}
    own["compress_prefill"] = policy != "streaming"
    if case.endswith(SPILL):
        own |= {"spill": True, "fetch_limit": args.fetch_limit, "spill_window": args.window}
    return own


def in_transformers(args: argparse.Namespace, own: dict[str, Any]) -> tuple[Answer, Callable]:
    """A PagedCache, and chunks of 512 tokens."""
    from paged_kv.hf import PagedCache
    from paged_kv.hf.driver.decoding import Decoder, load

    model = load(args.model, "float32")
    cache = PagedCache(model.config, **own)

    def answer(prompt: list[int], count: int) -> list[int]:
        cache.reset()
        decoder = Decoder(model, cache)
        decoder.read([prompt])
        for _ in range(count):
            decoder.step()
        new: list[int] = decoder.tokens[0, len(prompt) :].tolist()
        return new

    return answer, cache.close


def in_vllm(args: argparse.Namespace, own: dict[str, Any]) -> tuple[Answer, Callable]:
    """An engine with room for one prompt."""
    from paged_kv.vllm.driver.engine import Engine, engine_environment
    from paged_kv.vllm.driver.workload import EngineSettings, Workload

    os.environ.update(engine_environment())
    longest = args.tokens + 2 * DEFAULT_PAGE_SIZE
    settings = EngineSettings(
        model=str(args.model),
        pool_bytes=(longest + 64 * DEFAULT_PAGE_SIZE) * kv_bytes_per_token(args.model),
        max_model_len=longest,
        policy=own,
        max_num_seqs=1,
    )
    engine = Engine(settings)

    def answer(prompt: list[int], count: int) -> list[int]:
        for _ in engine.steps(Workload([prompt], count)):
            pass
        return engine.outputs[0]

    return answer, engine.close


if __name__ == "__main__":
    parser = script.make_parser(__doc__, budget=512)
    script.add_cases(parser, *CASES)
    add = parser.add_argument
    for name, default, help_ in (
        ("tokens", 6000, "tokens of a prompt"),
        ("facts", 3, "keys that are asked for at each depth"),
        ("fetch_limit", 64, "entries that a compaction may fetch"),
        ("window", 32, "queries that say what to fetch"),
    ):
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=script.positive, default=default, metavar="N", help=f"{help_} ({default})")
    add("--depths", type=int, nargs="+", default=[10, 30, 50, 70, 90], metavar="PERCENT",
        help="where the key stands (default 10 30 50 70 90)")  # fmt: skip
    add("--engine", choices=("hf", "vllm"), default="hf", help="default hf")
    raise SystemExit(script.run(main, parser))
