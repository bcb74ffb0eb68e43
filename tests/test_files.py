import errno
import os
import time

import pytest

from distill_cli import files
from distill_cli.errors import DistillError


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_atomic(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(DistillError, match="no space left on device") as error:
        files.write_atomic(path, "new")
    assert "free some space" in error.value.hint
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.folder_atomic(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    for content in "12":
        with files.folder_atomic(tmp_path / "f") as temporary:
            (temporary / content).write_text(content)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(tmp_path / "f") == ["2"]


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    dead, alive = tmp_path / f"{files._OURS}999999999-x", tmp_path / f"{files._OURS}{os.getpid()}-x"
    elsewhere, forgotten = (tmp_path / f"{files.TEMPORARY}other-machine+{k}-x" for k in (1, 2))
    theirs = tmp_path / ".tmp-notes"
    for path in (dead, alive, elsewhere, theirs):
        path.write_text("")
    forgotten.mkdir()
    (forgotten / "part").write_text("")
    for path in (forgotten / "part", forgotten, theirs):
        os.utime(path, (0, time.time() - 2 * files.A_DAY))
    assert files.is_empty(tmp_path)
    files.remove_temporaries(tmp_path)
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()  # another machine may be writing it
    assert not forgotten.exists()
    assert theirs.exists()


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DistillError, match="file"):
        files.write_atomic(tmp_path / "file" / "inner", "x")


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name is before the writer goes on: a power cut leaves the old or the new."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))

    def renamed(source, target):
        done.append(f"{os.path.basename(source)} is {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    place, own = tmp_path / "place", f"{files._OURS}{os.getpid()}"
    files.write_atomic(place / "a", "1")
    assert done == [f"{own}-a", f"{own}-a is a", "place"]
    done.clear()
    with files.folder_atomic(place / "f") as temporary:
        (temporary / "x").write_text("1")
    assert done == ["x", f"{own}-f", f"{own}-f is f", "place"]
