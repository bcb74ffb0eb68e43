"""Which methods take which families: taken.json, written anew by `python -m tests.contracts.taken`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

RECORD = Path(__file__).parent / "taken.json"


def recorded() -> dict[str, dict[str, bool]]:
    """Whether each method took each family when the record was written."""
    found: dict[str, dict[str, bool]] = json.loads(RECORD.read_text())
    return found


def main() -> None:
    from tests.contracts.running import Runs, pairs

    found: dict[str, dict[str, bool]] = {}
    with tempfile.TemporaryDirectory() as place:
        runs = Runs(Path(place))
        for method, family in pairs():
            ended = runs.run(method, family, 1).ended
            found.setdefault(method, {})[family] = ended.code == 0
            print(f"{method} on {family}: {'taken' if ended.code == 0 else ended.err.splitlines()[-2:]}")
    RECORD.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
