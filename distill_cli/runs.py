"""A run's folder: recipe.yaml, env.json, metrics.jsonl, samples/, checkpoints/, and the result."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError, UsageError
from distill_cli.files import TEMPORARY, is_empty, os_errors, read_plain, reading, remove_temporaries, sealed, sync, unsealed, write_atomic

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "lpips", "timm", "safetensors", "numpy", "pydantic", "typer")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that results depend on; imports none of them."""
    out = {"python": platform.python_version()}
    for name in ("distill-cli", *PACKAGES):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "missing"
    return out


_TOKENS = re.compile(r"(?<![A-Za-z0-9])(hf_|ghp_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA)[A-Za-z0-9_-]{8,}|(?<=://)[^/@\s]+(?=@)")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY($|_)")


def redacted(text: str) -> str:
    """`text` with *** in place of tokens, and of the values of environment variables whose names say that they are secret."""
    for name, value in os.environ.items():
        if _SECRET.search(name.upper()) and len(value) >= 6:
            text = text.replace(value, "***")
    return _TOKENS.sub("***", text)


ALWAYS: dict[str, Any] = {
    "guidance_calls": 1, "prompts": None, "negative_prompt": "", "images_per_prompt": 1, "guidance_scale": None, "clip": None,
    "compile": "none", "channels_last": False,
}  # fmt: skip
"""Settings that older folders lack, with the values they had."""


def settle(path: Path, settings: dict[str, Any], what: str, ours: str = "") -> None:
    """Begin a job's folder by writing its settings to `path`, or continue it if the settings there are the same.

    `ours` matches names of files that carry a hash of their settings: a folder with only such files may lack `path`. Raises UsageError
    for a folder with other settings, which are named, or with anything else in it.
    """
    folder = path.parent
    if path.exists():
        try:
            old = unsealed(read_plain(path))
        except ValueError as error:
            again = "delete it and run the same command: what is complete is kept" if ours else "choose another folder"
            raise DistillError(f"{path}: corrupt: {error}", again) from error
        settings = ALWAYS | json.loads(json.dumps(settings))
        old = ALWAYS | old
        if other := [*differences(old, settings, "")]:
            raise UsageError(f"--out {folder}: made with other settings: {'; '.join(other)}", "choose another folder, or the same settings")
        return
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    kept = bool(ours) and all(re.fullmatch(ours, name) or name.startswith(TEMPORARY) for name in names)
    if not is_empty(folder) and not kept and not path.exists():  # another process may have begun it since
        raise UsageError(f"--out {folder}: not empty, and not a folder of {what}", "choose another folder")
    write_atomic(path, sealed(settings, indent=2))


def differences(old: Any, new: Any, name: str) -> Iterator[str]:
    """What differs in two values of a setting, in words; of a list of things, such as a trace's models, in the thing that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:
            yield from differences(old.get(key), new.get(key), f"{name} {key}".lstrip())
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(isinstance(each, dict) for each in old):
        for k, (one, other) in enumerate(zip(old, new, strict=True), 1):
            yield from differences(one, other, f"{name} {k}")
    elif old != new:
        yield f"{name} is {old}, not {new}"


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a JSONL file; None if it is torn or damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Run:
    """A run's folder, made by `create` and opened again by `resume`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.recipe = self.folder / "recipe.yaml"
        self.metrics = self.folder / "metrics.jsonl"
        self.speed = self.folder / "speed.jsonl"
        self._clock = (0.0, 0)
        self.samples = self.folder / "samples"
        self.checkpoints = self.folder / "checkpoints"

    def must_be_new(self, command: str) -> None:
        """Raise UsageError if the folder exists and is not empty; nothing is overwritten."""
        if not is_empty(self.folder):
            known = self.recipe.is_file()
            hint = f"distill {command} --resume {self.folder} continues it; or choose another --out" if known else "choose another --out"
            raise UsageError(f"--out {self.folder}: exists already", hint)

    @classmethod
    def create(cls, folder: Path, recipe: str, command: str) -> Run:
        """Begin a run in a new folder."""
        run = cls(folder)
        run.must_be_new(command)
        remove_temporaries(run.folder)
        write_atomic(run.recipe, recipe)  # first: with it the run resumes, whatever happens now
        with os_errors(run.folder):
            run.samples.mkdir(exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
        command_line = [Path(sys.argv[0]).name, *map(redacted, sys.argv[1:])]
        env = {"versions": versions(), "platform": platform.platform(), "command": command_line}
        write_atomic(run.folder / "env.json", json.dumps(env, indent=2) + "\n")
        return run

    @classmethod
    def resume(cls, folder: Path) -> Run:
        """Open an existing run, and delete its temporary files."""
        run = cls(folder)
        with os_errors(run.folder):
            for part in (run.folder, run.samples, run.checkpoints):
                part.mkdir(exist_ok=True)
                remove_temporaries(part)
        return run

    def note(self, arithmetic: dict[str, Any], where: Any) -> None:
        """Say in env.json on which device (torch's) and in which arithmetic it trains; resumed elsewhere, the newest is kept."""
        import torch

        path = self.folder / "env.json"
        try:
            env = json.loads(path.read_text())
        except (OSError, ValueError):  # nothing depends on it
            env = {}
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
        write_atomic(path, json.dumps({**env, "device": name, "arithmetic": arithmetic}, indent=2) + "\n")

    def log(self, line: dict[str, Any], to: Path | None = None) -> None:
        """Append one line to metrics.jsonl, or to another file."""
        path = to or self.metrics
        with os_errors(path), open(path, "a") as handle:
            handle.write(json.dumps(line) + "\n")

    def log_speed(self, step: int, batch_size: int) -> None:
        """Append one line to speed.jsonl. Speed is kept apart because metrics.jsonl is the same for every run of a recipe."""
        now, (since, before) = time.time(), self._clock
        self._clock = (now, step)
        if since:
            rate = (step - before) * batch_size / max(1e-9, now - since)
            self.log({"step": step, "time": round(now, 3), "images_per_second": round(rate, 3)}, self.speed)

    def forget_after(self, step: int) -> None:
        """Drop lines of metrics.jsonl that are damaged, or past `step`: a resumed run writes those again."""
        self._clock = (time.time(), step)
        if not self.metrics.exists():
            return
        with reading(self.metrics):
            *lines, last = self.metrics.read_bytes().split(b"\n")
        if parsed(last) is not None:  # the last line may be empty, or torn
            lines.append(last)
        found = [(text, line.get("step")) for text in lines if (line := parsed(text)) is not None]
        if len(found) < len(lines):
            print(f"{self.metrics}: {len(lines) - len(found)} damaged lines are left out", file=sys.stderr)
        past = [isinstance(at, int | float) and at > step for _, at in found]
        write_atomic(self.metrics, b"".join(text + b"\n" for (text, _), late in zip(found, past, strict=True) if not late))

    def sync_metrics(self) -> None:
        """fsync the metrics; called before a checkpoint is written, so that they are never older than it."""
        sync(self.metrics)
