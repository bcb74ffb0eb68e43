"""The table of docs/models.md: size, cost and memory of each named teacher, by the plans of `distill dmd2` at full size.

python -m docs.models_table        # about 6 minutes; nothing is downloaded
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from pathlib import Path

from distill_cli.cli.app import run
from distill_cli.models import cost
from distill_cli.models.sources.catalog import HUB

OPTIONS = ("lora=64", "student_steps=4", "batch_size=1", "gan=none", "precision=bf16", "gradient_checkpointing=true", "health_every=0")


def plan(teacher: str, resolution: int, prompts: Path) -> dict[str, str]:
    """The lines of a plan, by what they are of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["dmd2", "--teacher", teacher, "--prompts", str(prompts), *OPTIONS, f"resolution={resolution}", "--dry-run"])
    if code:
        raise SystemExit(err.getvalue())
    return dict(re.findall(r"^#   ([\w ]+): (.*)$", out.getvalue(), re.MULTILINE))


def row(name: str, prompts: Path) -> str:
    """A line of the table."""
    model, known = cost.sketch(name), HUB[name]
    memory = [re.search(r"about ([\d.]+ GB)", plan(name, size, prompts)["memory"]) for size in (512, 1024)]
    text = sum(p.numel() for part in model.conditioner.parts().values() for p in part.parameters())
    cells = [
        f"`{name}`",
        f"{sum(p.numel() for p in model.denoiser.parameters()) / 1e9:.2f}B",
        f"{text / 1e9:.2f}B",
        f"{known.megabytes / 1000:.1f} GB",
        known.licence,
        f"{cost.evaluation(model.with_resolution(1024)) / 1e12:.1f}",
        f"{model.conditioner.embedding * 2 / 1e6:.2f} MB",
        *(found[1] if found else "?" for found in memory),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red circle\na blue square\n")
        for name in HUB:
            print(row(name, prompts), flush=True)


if __name__ == "__main__":
    main()
