"""Every Triton kernel on a GPU against the torch reference on the CPU.

The cases are those of tests/support/triton_cases.py, with fresh random inputs and poisoned pages
and outputs: one line for each of its tests. --few leaves a case of every kernel, for
compute-sanitizer, under which a kernel takes a hundred times as long. With --workers 8, eight
processes compile and run kernels at once (pytest-xdist).

On a CPU (--device cpu, with TRITON_INTERPRET=1) Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import os

import common
import kernel_session
import pytest

CASES = common.ROOT / "tests" / "support" / "triton_cases.py"
FEW = (
    "(test_attention and (decode or residual)) or (test_store_move_gather and 64) "
    "or (test_written and 64) or (test_observe and 64-3.0)"
)


class _Reporter:
    """A pytest plugin: a line for each test."""

    def __init__(self, part: common.Part) -> None:
        self.part = part
        self.num_tests = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called in the process that prints, whoever ran the test."""
        if report.when != "call" and report.passed:
            return
        case = report.nodeid.split("::")[-1]
        self.num_tests += 1
        if report.skipped:
            self.part.line(case, None, skipped=str(report.longrepr)[-300:])
            return
        fields = {"took_s": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            fields["error"] = (crash.message if crash else report.longreprtext)[:600]
        self.part.line(case, report.passed, **fields)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.part.line("collection", False, error=report.longreprtext[-600:])


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--few", action="store_true", help="a case of every kernel")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="processes beside this one (default 0)")  # fmt: skip
    parser.add_argument("--exhaustive", action="store_true", help="also 200 random attentions")
    parser.add_argument("--select", default="", metavar="K", help="as pytest's -k")
    args = parser.parse_args()
    part = common.Part("kernels_right", args)
    os.environ["PAGED_KV_DEVICE"] = args.device  # read by on_device
    os.environ.update(kernel_session.environment(part))
    select = args.select or (FEW if args.few else "")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(common.ROOT), "--tb=short"]
    options += ["-c", str(common.ROOT / "pyproject.toml"), f"--hypothesis-seed={part.seed}"]
    options += ["-n", str(args.workers)] if args.workers else ["-p", "no:xdist"]
    options += ["-m", "" if args.exhaustive else "not exhaustive", *(["-k", select] * bool(select))]
    options += ["-p", "kernel_session"]
    reporter = _Reporter(part)
    code = pytest.main([*options, str(CASES)], plugins=[reporter])
    if not reporter.num_tests or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        part.line("pytest", False, error=f"{reporter.num_tests} tests, exit code {int(code)}")
    return part.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
