"""`paged-kv generate`: text from a model whose cache is compressed, streamed, then statistics.

--prompt and --prompt-file continue a text as it is; --chat reads lines from the standard input and
answers them in the model's chat template until /exit or the end. The text goes to the standard
output, the cache's statistics to the standard error.

Without --policy, --budget and --policy-config the variables PAGED_KV_POLICY, PAGED_KV_BUDGET and
PAGED_KV_POLICY_CONFIG hold, and without those everything is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paged_kv import models
from paged_kv.bench.settings import decoder_config, kv_bytes_per_token
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.options import parse_json
from paged_kv.core.schedule import cdiv
from paged_kv.option_table import OPTIONS
from paged_kv.sampling import Sampling

MAX_CHAT_TOKENS = 8192  # of vLLM's pool
FLAGS = ("policy", "budget", "page_format", "residual_pages")  # have arguments of their own
SLACK_PAGES = 64  # pages of vLLM's pool beside those of the longest sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv generate`."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the default), a directory or a hub name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="a text to continue")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, UTF-8")
    source.add_argument("--chat", action="store_true", help="answer lines; /exit ends")
    add("--policy", metavar="NAME[+NAME]", help="see paged-kv policies")
    add("--budget", metavar="N|F", help=OPTIONS["budget"].describe())
    add("--policy-config", metavar="JSON", help="more options: see paged-kv options")
    add("--page-size", type=int, default=DEFAULT_PAGE_SIZE, metavar="N",
        help=f"whole pages are evicted (default {DEFAULT_PAGE_SIZE})")  # fmt: skip
    add("--page-format", metavar="FORMAT", help=OPTIONS["page_format"].describe())
    add("--residual-pages", type=int, metavar="N", help=OPTIONS["residual_pages"].describe())
    add("--engine", choices=("hf", "vllm"), default="hf", help="default hf")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, metavar="T",
        help="0 for the most likely token; default 0, or 1 with --top-k or --top-p")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="... from those that have this probability")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search (hf only; no streaming)")
    add("--seed", type=int, default=0, metavar="N", help="of what is sampled (default 0)")


def main(args: argparse.Namespace) -> None:
    """Generates. Raises ValueError, before a model is loaded, for what the user got wrong."""
    if args.engine == "vllm":
        from paged_kv.vllm.driver.engine import engine_environment

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # warnings would mix with the text
        os.environ.update(engine_environment())  # before torch is imported
    config, sampling = read_config(args), read_sampling(args)
    text = None if args.chat else read_text(args)
    model = models.resolve(args.model)
    limit = decoder_config(model).get("max_position_embeddings", MAX_CHAT_TOKENS)
    limit = min(limit, MAX_CHAT_TOKENS) if args.chat else limit
    from paged_kv.hf.driver.conversation import Conversation, load_tokenizer

    tokenizer = load_tokenizer(model)
    if text is None:
        conversation = Conversation(tokenizer)
        engine = start(args, model, tokenizer, config, sampling, limit)
    else:
        tokens = list(tokenizer(text, verbose=False).input_ids)
        needed = len(tokens) + sampling.max_new_tokens
        if not tokens or needed > limit:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens: it must have at least 1, and with "
                f"max-new-tokens {sampling.max_new_tokens} at most the model's {limit}"
            )
        engine = start(args, model, tokenizer, config, sampling, needed)
    try:
        if text is None:
            chat(conversation, engine, limit - sampling.max_new_tokens)
        else:
            write(engine, tokens)
        report(config, engine.statistics())
    finally:
        engine.close()


def read_config(args: argparse.Namespace) -> CompressionConfig:
    """What is kept. Raises ValueError."""
    if args.page_size < 1:
        raise ValueError(f"page-size must be an integer >= 1, not {args.page_size}")
    more = parse_json(args.policy_config, "policy-config") if args.policy_config else {}
    options = {name: getattr(args, name) for name in FLAGS}
    for name in FLAGS:
        if name in more:
            raise ValueError(f"policy-config must not have {name}: use --{name.replace('_', '-')}")
    config = CompressionConfig.from_env(**options, **more)
    if config.enabled:
        config.check_page_size(args.page_size)
    from paged_kv.tiers.files import check_spill_dir

    check_spill_dir(config.spill_dir)
    return config


def read_sampling(args: argparse.Namespace) -> Sampling:
    """How tokens are chosen. Raises ValueError."""
    if args.engine == "vllm" and args.num_beams != 1:
        raise ValueError(f"num-beams {args.num_beams}: engine vllm has no beams: use --engine hf")
    return Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_beams, args.seed
    )


def read_text(args: argparse.Namespace) -> str:
    """The prompt. Raises ValueError."""
    if args.prompt_file is None:
        return str(args.prompt)
    try:
        text: str = args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt-file {args.prompt_file}: {error}") from None
    return text


def start(
    args: argparse.Namespace,
    model: Path,
    tokenizer: Any,
    config: CompressionConfig,
    sampling: Sampling,
    max_len: int,
) -> Any:
    """The engine with the model: has write(tokens), statistics() and close()."""
    if args.engine == "hf":
        from paged_kv.hf.driver import text as hf

        return hf.TextGenerator(model, tokenizer, config, sampling, args.page_size)
    from paged_kv.vllm.driver import text as vllm

    policy = {} if config == CompressionConfig() else config.to_dict()
    pool_tokens = (cdiv(max_len, args.page_size) + SLACK_PAGES) * args.page_size
    pool_bytes = pool_tokens * kv_bytes_per_token(model)
    return vllm.TextGenerator(model, policy, sampling, args.page_size, max_len, pool_bytes)


def write(engine: Any, tokens: list[int]) -> list[int]:
    """Prints the text, then how fast it came; the new tokens."""
    begin = time.perf_counter()
    new: list[int] = engine.write(tokens)
    seconds = time.perf_counter() - begin
    _note(f"{len(tokens)} tokens read, {len(new)} written in {seconds:.1f} s")
    return new


def chat(conversation: Any, engine: Any, longest: int) -> None:
    """Answers lines until they end or the conversation has more than `longest` tokens."""
    for line in _lines():
        tokens = conversation.ask(line)
        if len(tokens) > longest:
            _note(f"the conversation has {len(tokens)} tokens, of {longest} at most: it ends here")
            return
        conversation.answered(write(engine, tokens))


def report(config: CompressionConfig, statistics: dict[str, Any]) -> None:
    """Prints the cache's statistics."""
    which = f"{config.policy}, budget {config.to_dict()['budget']}" if config.enabled else "full"
    shown = ", ".join(f"{name} {value}" for name, value in statistics.items())
    _note(f"cache ({which}): {shown}")


def _lines() -> Iterator[str]:
    """Lines of the standard input that are not empty, up to /exit."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _note(text: str) -> None:
    sys.stdout.flush()
    print(f"paged-kv: {text}", file=sys.stderr, flush=True)
