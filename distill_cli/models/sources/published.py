"""The published EDM teachers and consistency models by name: downloaded on first use, converted, cached."""

from __future__ import annotations

import http.client
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from distill_cli.errors import DistillError
from distill_cli.files import os_errors
from distill_cli.locks import alone
from distill_cli.models.sources.hub import offline
from distill_cli.processes import say_hidden

NVLABS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
OPENAI = "https://openaipublic.blob.core.windows.net/consistency/"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file on the web. `megabytes`: size of its float32 weights. The publishers give no checksums."""

    url: str
    megabytes: int
    summary: str
    steps: int = 18

    @property
    def licence(self) -> str:
        return "CC BY-NC-SA 4.0 (NVIDIA)" if self.url.startswith(NVLABS) else "MIT (OpenAI)"


PUBLISHED = {
    "edm-cifar10": Published(f"{NVLABS}edm-cifar10-32x32-cond-vp.pkl", 223, "EDM DDPM++, CIFAR-10, 10 classes"),
    "edm-cifar10-ve": Published(f"{NVLABS}edm-cifar10-32x32-cond-ve.pkl", 226, "EDM NCSN++, CIFAR-10, 10 classes"),
    "edm-cifar10-uncond": Published(f"{NVLABS}edm-cifar10-32x32-uncond-vp.pkl", 223, "EDM DDPM++, CIFAR-10"),
    "edm-cifar10-uncond-ve": Published(f"{NVLABS}edm-cifar10-32x32-uncond-ve.pkl", 226, "EDM NCSN++, CIFAR-10"),
    "edm-ffhq64": Published(f"{NVLABS}edm-ffhq-64x64-uncond-vp.pkl", 247, "EDM DDPM++, FFHQ 64x64", 40),
    "edm-ffhq64-ve": Published(f"{NVLABS}edm-ffhq-64x64-uncond-ve.pkl", 252, "EDM NCSN++, FFHQ 64x64", 40),
    "edm-afhqv2-64": Published(f"{NVLABS}edm-afhqv2-64x64-uncond-vp.pkl", 247, "EDM DDPM++, AFHQv2 64x64", 40),
    "edm-afhqv2-64-ve": Published(f"{NVLABS}edm-afhqv2-64x64-uncond-ve.pkl", 252, "EDM NCSN++, AFHQv2 64x64", 40),
    "edm-imagenet64": Published(f"{NVLABS}edm-imagenet-64x64-cond-adm.pkl", 1184, "EDM ADM, ImageNet 64x64, 1000 classes", 256),
    "cm-imagenet64": Published(f"{OPENAI}cd_imagenet64_lpips.pt", 1184, "consistency model, ImageNet 64x64, 1000 classes"),
}


def cache() -> Path:
    """The folder of downloads and converted models: DISTILL_CACHE, or ~/.cache/distill."""
    return Path(os.environ.get("DISTILL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill")


def download(url: str, path: Path, what: str) -> None:
    """Fetch `url` to `path`, complete or absent; a partial download is continued.

    `what` (name, size, licence) is printed first. Raises DistillError without a network, and if the connection ends early:
    the part that came is kept for the next call.
    """
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    hint = f"where there is a network: curl -L -O {url} ({what}), then distill convert {path.name} --out FOLDER"
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if offline():
            raise DistillError(f"{path.name}: not in {path.parent}, and HF_HUB_OFFLINE is set", hint)
        print(f"downloading {url} ({what})", file=sys.stderr)
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - https, from the table
        try:
            with urllib.request.urlopen(request, timeout=60) as answer, open(part, "ab" if have else "wb") as handle:  # noqa: S310
                if have and answer.status != 206:  # the server sends the whole file
                    handle.seek(0)
                    handle.truncate()
                    have = 0
                total = have + int(answer.headers.get("Content-Length") or 0)
                with tqdm(
                    total=total or None, initial=have, unit="B", unit_scale=True, desc=path.name, disable=not sys.stderr.isatty()
                ) as bar:
                    while data := answer.read(CHUNK):
                        handle.write(data)
                        bar.update(len(data))
            size = part.stat().st_size
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the partial file is too long
                part.unlink()
            raise DistillError(
                f"{url}: the server answers {error.code}", "run the same command again" if error.code == 416 else hint
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise DistillError(f"{url}: not to be had ({' '.join(str(reason).split())})", hint) from error
        if total and size != total:
            raise DistillError(
                f"{url}: the connection ended after {size} of {total} bytes", "run the same command again: it goes on from there"
            )
        os.replace(part, path)


def published_as(file: str) -> str:
    """The registry's name for a publisher's file name, or ''."""
    return next((name for name, published in PUBLISHED.items() if published.url.endswith(f"/{file}")), "")


def to_download(name: str) -> str:
    """The download that loading `name` would start, for plans; '' for none."""
    published = PUBLISHED.get(name)
    if published is None or (cache() / "models" / name / "model_index.json").is_file():
        return ""
    say_hidden("model", name, "the built-in one")
    return f"{name}: about {published.megabytes} MB from {published.url}, licence {published.licence}"


def fetch(name: str) -> Path:
    """The model folder of a published model, downloaded and converted if it is not in the cache."""
    from distill_cli.models.sources.convert import convert_file

    published = PUBLISHED[name]
    folder = cache() / "models" / name
    if (folder / "model_index.json").is_file():
        return folder
    file = cache() / "downloads" / published.url.rsplit("/", 1)[1]
    with alone(cache() / "lock"):
        if (folder / "model_index.json").is_file():  # another process has made it
            return folder
        if not file.is_file():
            download(published.url, file, f"{name}: about {published.megabytes} MB, licence {published.licence}")
        try:
            convert_file(file, folder, name=name, steps=published.steps)
        except DistillError as error:
            if not error.message.startswith(str(file)):  # an error of the disk, not of the file
                raise
            raise DistillError(error.message, f"the download may be damaged: delete {file} and run the same command again") from error
    return folder
