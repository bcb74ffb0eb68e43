"""Which families a method refuses: refused.json, written anew by `python -m tests.contracts.refused`. Those not named are taken."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

RECORD = Path(__file__).parent / "refused.json"


def recorded() -> dict[str, list[str]]:
    """The families that each method refused when the record was written."""
    found: dict[str, list[str]] = json.loads(RECORD.read_text())
    return found


def main() -> None:
    from tests.contracts.running import Runs, pairs

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        runs = Runs(Path(place))
        for method, family in pairs():
            ended = runs.run(method, family, 1).ended
            if ended.code:
                found.setdefault(method, []).append(family)
            print(f"{method} on {family}: {ended.err.splitlines()[-2:] if ended.code else 'taken'}")
    RECORD.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
