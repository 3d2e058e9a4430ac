"""`paged-kv eval NAME`: modules with `add_arguments(parser)` and `main(args)`."""

from __future__ import annotations

import argparse

from paged_kv.eval import perplexity

EVALUATIONS = {
    "perplexity": ("how well a text is predicted from a compressed cache", perplexity),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The evaluations, each with its options."""
    subparsers = parser.add_subparsers(dest="evaluation", metavar="NAME", required=True)
    for name, (help_, module) in EVALUATIONS.items():
        subparser = subparsers.add_parser(name, help=help_, description=module.__doc__)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(subparser)


def main(args: argparse.Namespace) -> None:
    """Runs the chosen one."""
    EVALUATIONS[args.evaluation][1].main(args)
