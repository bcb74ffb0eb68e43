"""Files of tensors that carry their own checksum, so every flipped bit shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from distill_cli.errors import DistillError
from distill_cli.files import read_plain, unreadable, write_atomic

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""Types that a store may use for its tensors."""
_ZEROS = b"0" * 64


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to `path`, complete or absent. The header holds `metadata` and the file's SHA-256, computed with that field zeroed."""
    # one metadata key, because safetensors writes several in random order
    content = to_bytes(tensors, {"distill": json.dumps({**metadata, "sha256": _ZEROS.decode()})})
    place = content.index(_ZEROS)
    digest = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content[:place] + digest + content[place + 64 :])


def check(path: Path, again: str, whole: bool = True) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The metadata of a file and the shapes of its tensors; raises DistillError, with the hint `again`, if it is damaged.

    `whole`: also compare the checksum; False for a file that was verified before.
    """
    try:
        content = read_plain(path) if whole else b""
        with safe_open(path, "pt") as handle:
            metadata = json.loads((handle.metadata() or {}).get("distill", "{}"))
            stored = str(metadata.get("sha256")).encode()
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DistillError(f"{path}: missing", again.rpartition("and ")[2]) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, AttributeError) as error:
        raise DistillError(f"{path}: corrupt or truncated", again) from error
    if whole and (len(stored) != 64 or hashlib.sha256(content.replace(stored, _ZEROS, 1)).hexdigest().encode() != stored):
        raise DistillError(f"{path}: corrupt: its checksum does not match", again)
    return metadata, shapes
