"""Documents that people can read: no line of a *.md file is wider than 100 columns.

`make lint` runs this file; tests/test_documents.py calls the same functions.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
ROOT = Path(__file__).resolve().parent.parent.parent
# What lies in the folder but is not written here: environments, caches, results.
IGNORED = re.compile(r"\..+|results|build|node_modules|.*\.egg-info")
# A URL cannot be broken: a line of its own may be as long as it is.
URL = re.compile(r"\s*[*<(\[]*\S*https?://\S+")


def documents(root: Path = ROOT) -> list[Path]:
    """The *.md files below `root`, sorted."""
    paths = sorted(root.rglob("*.md"))
    return [path for path in paths if not any(map(IGNORED.fullmatch, path.relative_to(root).parts))]


def long_lines(root: Path = ROOT) -> Iterator[str]:
    """file:line and the width of each line that is too wide, relative to `root`."""
    for path in documents(root):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDTH and not URL.fullmatch(line):
                name = path.relative_to(root)
                yield f"{name}:{number}: {len(line)} columns, at most {WIDTH} are allowed"


if __name__ == "__main__":
    sys.exit("\n".join(long_lines()) or None)
