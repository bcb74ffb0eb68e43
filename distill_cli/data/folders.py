"""Find the pictures below a folder: which files are read, and which are left out (hidden files, system folders, result sheets)."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from distill_cli.errors import DistillError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".heic", ".heif")
"""Suffixes of pictures; some formats can be read only if this machine's Pillow supports them."""
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders without data that archives, storage boxes and file systems add."""
SHEET, EDITS, LIST = "side-by-side.png", "edits.json", "samples.jsonl"
SHEETS = {"grid.png": LIST, SHEET: EDITS, "comparison.png": "recipe.yaml", "picture.png": "report.json"}
"""Sheets of pictures that this package writes, each with a file that lies beside it."""
KINDS, NAMED = 8, 3
"""Most kinds of left-out files, and most names of each, in the line that reports them."""


@dataclass
class Found:
    """The pictures below a folder, in the order of their paths, and what was left out."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """The number of files and folders of each kind; (s) in a kind marks its plural."""
    broken: list[str] = field(default_factory=list)
    """Links that lead nowhere."""
    folders: list[str] = field(default_factory=list)
    """The first level of subfolders; `empty` lists subfolders without pictures."""
    empty: list[str] = field(default_factory=list)

    @property
    def without(self) -> str:
        """The report of what was left out, appended to the report of what was read; '' if nothing was."""
        shown = self.left_out.most_common(KINDS)
        others = self.left_out.total() - sum(count for _, count in shown)
        counts = [*shown, *([("other file(s)", others)] if others else [])]
        for kind, names in (("broken link(s)", self.broken), ("folder(s) without pictures", self.empty)):
            if names:
                counts.append((f"{kind} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})", len(names)))
        parts = ", ".join(f"{count} {kind.replace('(s)', 's' * (count > 1))}" for kind, count in counts)
        return f"; left out: {repr(parts)[1:-1]}" if parts else ""  # names may hold control characters


def readable() -> frozenset[str]:
    """The SUFFIXES that this machine's Pillow can read."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix in SUFFIXES if known.get(suffix) in Image.OPEN)


def pictures_below(root: Path) -> Found:
    """Every picture below `root`. Links are followed, and each folder is read once; raises DistillError if one cannot be read.

    Hidden files and folders, SYSTEM folders, SHEETS and files that are no pictures are left out. `root` itself may be hidden.
    """
    found, read = Found(), readable()
    seen: set[tuple[int, int]] = set()
    folders = [root]
    try:
        while folders:  # real folders first, then links to folders
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
