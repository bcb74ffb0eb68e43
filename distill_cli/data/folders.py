"""Pictures below a folder, as notebooks, Macs, clusters and this package leave them: what is read, and what is left out."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from distill_cli.errors import DistillError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".heic", ".heif")
"""How names of pictures end; some formats are read only where this machine's Pillow knows them."""
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders that archives, storage boxes and file systems add, in which lies no data."""
SHEET, EDITS, LIST = "side-by-side.png", "edits.json", "samples.jsonl"
SHEETS = {"grid.png": LIST, SHEET: EDITS, "comparison.png": "recipe.yaml", "picture.png": "report.json"}
"""Pictures of pictures that this package writes, and what lies beside them."""
KINDS, NAMED = 8, 3
"""So many kinds of what was left out, and so many names, are listed in a line."""


@dataclass
class Found:
    """The pictures below a folder, in the order of their paths, and what was left out."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files and folders of which kind; (s) stands where the plural has an s."""
    broken: list[str] = field(default_factory=list)
    """Links that lead nowhere."""
    folders: list[str] = field(default_factory=list)
    """The first level of subfolders; `empty` are those without pictures."""
    empty: list[str] = field(default_factory=list)

    @property
    def without(self) -> str:
        """What was left out, to follow what was read; '' where nothing was."""
        shown = self.left_out.most_common(KINDS)
        others = self.left_out.total() - sum(count for _, count in shown)
        counts = [*shown, *([("other file(s)", others)] if others else [])]
        for kind, names in (("broken link(s)", self.broken), ("folder(s) without pictures", self.empty)):
            if names:
                counts.append((f"{kind} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})", len(names)))
        parts = ", ".join(f"{count} {kind.replace('(s)', 's' * (count > 1))}" for kind, count in counts)
        return f"; left out: {repr(parts)[1:-1]}" if parts else ""  # names may hold control characters


def readable() -> frozenset[str]:
    """Those of SUFFIXES that this machine's Pillow reads."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix in SUFFIXES if known.get(suffix) in Image.OPEN)


def pictures_below(root: Path) -> Found:
    """Every picture below `root`. Links are followed, each folder is read once, and one that cannot be read is an error.

    Hidden files and folders, those in SYSTEM, SHEETS, and files that are no pictures are left out; `root` itself may be hidden.
    """
    found, read = Found(), readable()
    seen: set[tuple[int, int]] = set()
    folders = [root]
    try:
        while folders:  # links to folders come after all that really stand here
            links: list[Path] = []
            for folder in sorted(folders):
                _read_folder(folder, root, found, read, seen, links)
            folders = links
    except OSError as error:
        raise DistillError(f"{error.filename or root}: {(error.strerror or str(error)).lower()}") from error
    found.files.sort()
    there = {file.relative_to(root).parts[0] for file in found.files}
    found.empty = sorted(name for name in found.folders if name not in there)
    return found


def _read_folder(folder: Path, root: Path, found: Found, read: frozenset[str], seen: set[tuple[int, int]], links: list[Path]) -> None:
    """Add what is in a folder and below it to `found`, and links to folders to `links`."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        found.left_out["link(s) to a folder that is read already"] += 1
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as opened:
        entries = sorted(opened, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    for entry in entries:
        path, suffix = folder / entry.name, os.path.splitext(entry.name)[1].lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            is_folder = is_file = False
        if entry.name.startswith("."):
            found.left_out["hidden folder(s)" if is_folder else "hidden file(s)"] += 1
        elif is_folder and entry.name in SYSTEM:
            found.left_out[f"folder(s) {entry.name}"] += 1
        elif is_folder:
            if folder == root:
                found.folders.append(entry.name)
            if entry.is_symlink():
                links.append(path)
            else:
                _read_folder(path, root, found, read, seen, links)
        elif not is_file:
            if entry.is_symlink():
                found.broken.append(str(path.relative_to(root)))
            else:
                found.left_out["pipe(s) or device(s)"] += 1
        elif SHEETS.get(entry.name) in names:
            found.left_out[entry.name] += 1
        elif suffix in read:
            found.files.append(path)
        elif suffix in SUFFIXES:
            found.left_out[f"{suffix} file(s) that Pillow cannot read here"] += 1
        else:
            found.left_out[f"{suffix} file(s)" if suffix else "file(s) without a suffix"] += 1
