"""What computes a decoded token's attention in transformers: SDPA or compiled flex_attention.

runs       every row has a prompt of its own: its pages are neighbours, SDPA reads them in place
scattered  rows share a prompt, as beams do: SDPA needs a copy of each row's pages

Only forward passes of one token per row are timed, with nothing evicted. The caches step in turn;
ms are medians over rounds of the mean step, ratio is the median over rounds of flex's time by
SDPA's; dynamic is transformers' own cache.
"""

import argparse
from statistics import mean, median

import torch
from tqdm import tqdm

from paged_kv.bench import script
from paged_kv.bench.settings import random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.hf import PagedCache
from paged_kv.hf.driver.decoding import DTYPES, Decoder, dynamic_cache, interleaved, load

SHUFFLES = 2 * DEFAULT_PAGE_SIZE  # steps of a beam search, before anything is timed


def main(args: argparse.Namespace) -> None:
    cases = [
        (name, dtype, batch) for dtype in args.dtypes for name in args.cases
        for batch in args.batches if name == "runs" or batch > 1
    ]  # fmt: skip
    for name, dtype, batch in tqdm(cases, unit="case"):
        model = load(args.model, dtype)
        caches = {
            "dynamic": dynamic_cache(model),
            "sdpa": PagedCache(model.config, policy="full"),
            "flex": PagedCache(model.config, policy="full", attention="flex"),
        }
        decoders = {key: Decoder(model, cache) for key, cache in caches.items()}
        for decoder in decoders.values():
            prepare(args, decoder, name, batch)
        interleaved(decoders, 4)  # warms up, and compiles
        rounds = [interleaved(decoders, DEFAULT_PAGE_SIZE) for _ in range(args.rounds)]
        times = {key: [mean(seconds[key]) for seconds in rounds] for key in decoders}
        ratios = [flex / sdpa for flex, sdpa in zip(times["flex"], times["sdpa"], strict=True)]
        measured = {f"{key}_ms": round(1e3 * median(own), 3) for key, own in times.items()}
        measured |= {"ratio": round(median(ratios), 4), "ratios": [round(r, 4) for r in ratios]}
        case = {"case": name, "dtype": dtype, "batch": batch, "tokens": args.context}
        script.emit("hf_attention", args, {**case, **measured})
        for key in ("sdpa", "flex"):
            caches[key].close()


def prepare(args: argparse.Namespace, decoder: Decoder, case: str, batch: int) -> None:
    """Reads the prompts; scattered: one prompt, whose rows then branch and die like beams."""
    if case == "runs":
        decoder.read(random_prompts(args.model, batch, args.context, args.seed))
        return
    decoder.read(random_prompts(args.model, 1, args.context, args.seed))
    decoder.cache.batch_repeat_interleave(batch)
    decoder.tokens = decoder.tokens.repeat_interleave(batch, 0)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(SHUFFLES):
        decoder.step()
        rows = torch.randint(batch, (batch,), generator=generator)
        decoder.cache.reorder_cache(rows)
        decoder.tokens = decoder.tokens[rows]


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=5)
    script.add_cases(parser, "runs", "scattered")
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32"], metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} (default float32)")  # fmt: skip
    add("--batches", type=script.positive, nargs="+", default=[1, 8], metavar="N",
        help="rows (default 1 8)")  # fmt: skip
    add("--context", type=script.positive, default=2048, metavar="N", help="default 2048")
    raise SystemExit(script.run(main, parser))
