"""The folder that a program in docs works in, by its command line; --help prints what the program does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def asked(default: str = "") -> Path:
    """The folder that was asked for; by default runs/NAME of the program."""
    program = sys.modules["__main__"]
    name = program.__spec__.name if program.__spec__ else Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(f"python -m {name}", description=program.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = default or f"runs/{name.rpartition('.')[2].replace('_', '-')}"
    parser.add_argument("folder", type=Path, nargs="?", default=Path(default), help=f"default {default}")
    found: Path = parser.parse_args().folder
    return found
