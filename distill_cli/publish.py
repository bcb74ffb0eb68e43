"""A model on the Hugging Face hub: the files of a run that go there, the card with pictures of the run, and one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_cli.errors import DistillError, Interrupted, UsageError, reason
from distill_cli.files import os_errors, reading
from distill_cli.models import header
from distill_cli.models.parts import read_json
from distill_cli.models.sources.catalog import LORA
from distill_cli.models.sources.hub import offline
from distill_cli.models.sources.registry import PARTS

CARD = "README.md"
TOP = ("model_index.json", "distill.json", LORA, CARD)
"""Files of a model's folder that go."""
SUFFIXES = (".json", ".safetensors", ".txt", ".model")
"""What files end in that go from the folder of a network, a tokenizer or a scheduler."""
LOGIN = "hf auth login, or HF_TOKEN=..., with a token that may write: https://huggingface.co/settings/tokens"
AGAIN = "nothing was committed; the same command again sends only the files that the hub does not have whole"


@dataclass
class Parcel:
    """What goes to the hub."""

    files: dict[str, Path] = field(default_factory=dict)
    """Names there -> files here, without the card."""
    card: str = ""
    left: list[str] = field(default_factory=list)
    """Names in the model's folder that do not go."""
    remarks: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, the card among them."""
        with os_errors(Path(CARD)):
            sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted({**sizes, CARD: len(self.card.encode())}.items()))


def parcel(path: Path, repo: str) -> Parcel:
    """What of a run's folder, or of a model's, goes to `repo` of the hub. Raises UsageError or DistillError where there is no model."""
    folder = next((folder for folder in (path, *(path / part for part in PARTS)) if (folder / "distill.json").is_file()), None)
    if folder is None:
        _refuse(path)
    assert folder is not None
    index = read_json(folder / TOP[0]) if (folder / TOP[0]).is_file() else {}
    named = {part for part, value in index.items() if isinstance(value, list) and value and value[0]} | {"scheduler"}
    out = Parcel()
    with reading(folder):
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            part, _, rest = name.rpartition("/")
            fits = name in TOP if not part else part in named and file.suffix in SUFFIXES and not rest.startswith(".")
            if file.is_file():
                out.files |= {name: file} if fits else {}
                out.left += [] if fits else [name]
    if folder != path and (path / "recipe.yaml").is_file():
        grids = sorted((path / "samples").glob("*.png"))[-1:]
        pictures = {"comparison.png": path / "comparison.png", **{f"samples/{grid.name}": grid for grid in grids}}
        out.files |= {name: file for name, file in {"recipe.yaml": path / "recipe.yaml", **pictures}.items() if file.is_file()}
    _describe(out, folder, repo)
    return out


def _refuse(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder", "give the folder of a run, or of a model")
    if (path / "recipe.yaml").is_file():
        raise DistillError(f"{path}: a run without a model", "a run that trains one has it at its end; --resume finishes a run")
    raise DistillError(f"{path}: no model that distill has written: it has no distill.json", "give the folder of a run, or of a model")


SHOWN = {"comparison.png": "The teacher and the student, from the same noise", "samples/": "Samples at the end of training"}
"""Pictures of a run, by what their names begin with -> what they show."""


def _describe(out: Parcel, folder: Path, repo: str) -> None:
    """The card with the pictures of the run under its title and programs for the repository, and what its reader should know."""
    if CARD not in out.files:
        raise DistillError(f"{folder / CARD}: missing", "the hub shows it as the model's card")
    with reading(folder / CARD):
        text = out.files.pop(CARD).read_text()
    text = text.replace('"FOLDER"', f'"{repo}"').replace("--model FOLDER", f"--model {repo}")
    shown = [f"\n![{said}]({name})\n" for start, said in SHOWN.items() for name in out.files if name.startswith(start)]
    out.card = re.sub(
        r"(?m)^# .*\n",
        lambda title: title[0] + "".join(shown),
        text.replace('"FOLDER"', f'"{repo}"').replace("--model FOLDER", f"--model {repo}"),
        count=1,
    )
    if not header.licence_of(text):
        out.remarks.append(f"{folder / CARD} names no licence in its header: the hub will show none")
    lora = read_json(folder / "distill.json").get("lora")
    if isinstance(lora, dict) and str(lora.get("base", "")).startswith("/"):
        out.remarks.append(f"the LoRA's base is a path of this machine, {lora['base']}: others cannot load it by distill.json or the card")
    if "recipe.yaml" in out.files:
        with reading(out.files["recipe.yaml"]):
            paths = re.findall(r"(?m)^(\w+): ['\"]?(/\S*)", out.files["recipe.yaml"].read_text())
        if paths:
            named = ", ".join(f"{key} {path}" for key, path in paths)
            out.remarks.append(f"recipe.yaml and the card name paths of this machine: {named}")


def endpoint() -> str:
    """The address of the hub: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def push(what: Parcel, repo: str, private: bool) -> dict[str, Any]:
    """Send files to a repository of the hub, which is made if it is not there, as one commit.

    Raises DistillError without a token, without a network, or where the hub refuses; then nothing is committed.
    """
    if offline():
        raise DistillError("push: HF_HUB_OFFLINE is set, so nothing is sent", "unset it where there is a network; --dry-run sends nothing")
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import RepositoryNotFoundError

    if not get_token():
        raise DistillError("push: no token of the Hugging Face hub", LOGIN)
    hub = HfApi()
    try:
        try:
            found = hub.model_info(repo)
        except RepositoryNotFoundError:
            found = None
        if found is not None and private and not found.private:
            raise DistillError(
                f"--private: {repo} exists and is public", "make it private in its settings on the hub, or leave --private out"
            )
        if found is None:
            hub.create_repo(repo, private=private, exist_ok=True)
        content = {**what.files, CARD: what.card.encode()}
        operations = [CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in content.items()]
        commit = hub.create_commit(repo, operations, commit_message="Model and card, by distill push")
    except DistillError:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted("push: interrupted", AGAIN) from error
    except Exception as error:  # huggingface_hub's errors, and those of the library below it, share no base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DistillError(f"push: the hub does not let this token write to {repo} ({reason(error)})", LOGIN) from error
        raise DistillError(f"push: {repo} could not be sent ({type(error).__name__}: {reason(error)})", AGAIN) from error
    same = found is not None and found.sha == commit.oid
    return {"repo": repo, "url": f"{endpoint()}/{repo}", "commit": commit.oid, "made": found is None, "changed": not same}
