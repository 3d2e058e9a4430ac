"""Says which versions are imported, and fails where they are not those of a lock (argv[1])."""

import sys
from importlib import metadata
from pathlib import Path

lines = [line.split("#")[0].strip() for line in Path(sys.argv[1]).read_text().splitlines()]
for name, version in (line.split("==") for line in lines if line):
    found = metadata.version(name)
    if found != version:
        sys.exit(f"{sys.argv[1]} says {name} {version}, installed is {found}")
    print(f"{name} {found}, torch {metadata.version('torch')}")
