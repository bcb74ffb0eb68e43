"""Models by name, folder or hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.models.published import PUBLISHED, fetch

if TYPE_CHECKING:
    from distill_cli.models.model import Model

BUILTIN = Path(__file__).parent / "builtin"
PARTS = ("student", "teacher")


@dataclass(frozen=True)
class Entry:
    """A model that is known by name."""

    name: str
    summary: str
    licence: str
    load: Callable[[], Model]


def _digits() -> Model:
    from distill_cli.models import pixel

    return pixel.load(BUILTIN / "digits", "digits")


def _tiny() -> Model:
    from distill_cli.diffusion.schedule import EDMSchedule
    from distill_cli.models import pixel
    from distill_cli.models.model import Lineage

    return pixel.create(
        resolution=16,
        channels=[8, 16],
        attention=[False, True],
        groups=4,
        head=8,
        classes=[str(i) for i in range(10)],
        schedule=EDMSchedule(),
        parameterisation="edm",
        lineage=Lineage(name="tiny", licence="Apache-2.0", data="none: random weights"),
    )


def _published(name: str) -> Model:
    from distill_cli.models import pixel

    return pixel.load(fetch(name), name)


REGISTRY = {
    entry.name: entry
    for entry in (
        Entry(
            "digits",
            "EDM, 16x16 RGB, handwritten digits in coloured ink, 10 classes; ships with distill",
            "Apache-2.0; data CC BY 4.0",
            _digits,
        ),
        Entry("tiny", "EDM, 16x16 RGB, random weights of a fixed seed, for smoke runs", "Apache-2.0", _tiny),
        *(
            Entry(name, f"{known.summary}; {known.megabytes} MB, downloaded on first use", known.licence, partial(_published, name))
            for name, known in PUBLISHED.items()
        ),
    )
}


def folder_of(path: Path) -> Path | None:
    """The model's folder in `path`, which is one itself or a run."""
    return next((folder for folder in (path, *(path / part for part in PARTS)) if (folder / "model_index.json").is_file()), None)


def load(name: str) -> Model:
    """The model called `name`: a built-in one, a folder (of a model, or of a run), or a hub id. Float32, on the CPU.

    Raises UsageError for an unknown name and DistillError for a folder that cannot be read.
    """
    if name in REGISTRY:
        model = REGISTRY[name].load()
        model.denoiser.eval().requires_grad_(False)
        return model
    from distill_cli.models import pixel

    path = Path(name)
    if path.is_dir():
        folder = folder_of(path)
        if folder is not None:
            return pixel.load(folder, path.name)
        if (path / "recipe.yaml").is_file():
            raise DistillError(f"{path}: a run that has not finished: it has no student yet", f"finish it with --resume {path}")
        raise DistillError(f"{path}: no model: it has no model_index.json", "give a diffusers pipeline folder")
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return pixel.load(_download(name), name)
    raise UsageError(f"{name}: no model of that name and no such folder", nearest(name, REGISTRY, "built in"))


def _download(hub_id: str) -> Path:
    """The folder of a hub model in the Hugging Face cache, downloaded where missing, after a line that says what it is."""
    import json
    import sys

    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    from distill_cli.models.pixel import PIPELINES

    wanted = ["model_index.json", "distill.json", "scheduler/*.json", "unet/*.json", "unet/diffusion_pytorch_model.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
        if (folder / "unet/diffusion_pytorch_model.safetensors").exists():
            return folder
    except Exception as error:  # not in the cache: huggingface_hub raises several kinds
        del error
    try:
        pipeline = json.loads(Path(hf_hub_download(hub_id, "model_index.json")).read_text()).get("_class_name")
        if pipeline in PIPELINES:
            info = HfApi().model_info(hub_id, files_metadata=True)
            size = sum(f.size or 0 for f in info.siblings or [] if f.rfilename in wanted)
            licence = info.card_data.get("license") if info.card_data else None
            print(f"downloading {hub_id}: {size / 1e6:.0f} MB, licence {licence or 'not stated'}", file=sys.stderr)
            return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # offline, no such model, gated: the hub's errors share no useful base
        raise DistillError(
            f"{hub_id}: not in the Hugging Face cache, no folder of that name, and not to be had from the hub ({type(error).__name__})",
            f"where there is a network: hf download {hub_id}; then set HF_HOME, or give the folder's path",
        ) from error
    raise DistillError(f"{hub_id}: a {pipeline}, which this version does not read", f"it reads {', '.join(PIPELINES)}")
