"""`paged-kv bench NAME`: modules with `add_arguments(parser)` and `main(args)`."""

from __future__ import annotations

import argparse

from paged_kv.bench import cache_speedup

BENCHMARKS = {
    "cache-speedup": ("what a token costs with a cache and without one", cache_speedup),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks, each with its options."""
    subparsers = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name, (help_, module) in BENCHMARKS.items():
        subparser = subparsers.add_parser(name, help=help_, description=module.__doc__)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(subparser)


def main(args: argparse.Namespace) -> None:
    """Runs the chosen one."""
    BENCHMARKS[args.benchmark][1].main(args)
