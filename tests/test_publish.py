"""distill push, against a stand-in of the hub on loopback, and what it refuses without one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest

from distill_cli.models import formats, header
from distill_cli.models.lineage import Lineage
from distill_cli.models.sampler import Sampler

ROOT = Path(__file__).parents[1]
REPO = "someone/digits-in-one-step"
BEFORE = {"old.txt": b"from before"}


class Hub(ThreadingHTTPServer):
    """The calls that huggingface_hub makes for a commit: repository, validation, preupload, LFS batch, upload, commit."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.asked, self.sent, self.refused = {}, {}, [], [], 0
        self.lock = Lock()
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path, body):
        """(status, JSON) for a POST."""
        data = json.loads(body.splitlines()[0]) if body else {}
        if path == "/api/repos/create":
            self.repos[f"{data['organization']}/{data['name']}"] = {}
            return 200, {"url": f"{self.url}/{REPO}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        there = self.repos[REPO]
        if "/preupload/" in path:
            modes = {each["path"]: "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular" for each in data["files"]}
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": self.oid(there.get(name), mode)}
                                   for name, mode in modes.items()]}  # fmt: skip
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = {each["oid"]: each for each in data["objects"]}
            for oid in objects.keys() - self.blobs.keys():
                objects[oid]["actions"] = {"upload": {"href": f"{self.url}/{oid}"}}
            return 200, {"objects": list(objects.values())}
        assert path == f"/api/models/{REPO}/commit/main", path
        for line in map(json.loads, body.splitlines()[1:]):
            value = line["value"]
            there[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else self.blobs[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{REPO}/commit/1", "commitOid": self.sha}

    @staticmethod
    def oid(content, mode):
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if mode == "lfs" else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha(self):
        return hashlib.sha1(repr(sorted(self.repos[REPO].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def reply(self, status, data, **headers):
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def do_GET(self):
        self.server.asked.append(self.path)
        if REPO not in self.server.repos:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        asked_by_old_versions = {"downloads": 0, "likes": 0, "siblings": [], "tags": []}
        return self.reply(200, {"id": REPO, "private": False, "sha": self.server.sha, **asked_by_old_versions})

    def do_POST(self):
        self.server.asked.append(self.path)
        body = self.body()
        if self.headers.get("Authorization") != "Bearer hf_standin":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        return self.reply(*self.server.answer(self.path, body))

    def do_PUT(self):
        body = self.body()
        assert "Authorization" not in self.headers  # the token is the hub's alone
        with self.server.lock:  # several files come at once
            room = not self.server.refused or len(self.server.sent) < self.server.refused
            if room:
                self.server.sent.append(self.path.removeprefix("/"))
                self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        return self.reply(200, {}) if room else self.reply(400, {"error": "no room"})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A finished run, with all that must stay at home."""
    place = tmp_path_factory.mktemp("push") / "run"
    own = Lineage(name="tiny-dmd", kind="student", method="dmd", teacher="tiny", licence="Apache-2.0")
    formats.save(replace(tiny, lineage=own, sampler=Sampler.one_step(tiny.denoiser.schedule)), place / "student")
    kept = {
        "recipe.yaml": "command: dmd\nteacher: tiny\npairs: /home/me/pairs\n", "comparison.png": "picture", "samples/000500.png": "early",
        "samples/001000.png": "last", "checkpoints/step-001000/student.safetensors": "moments", "env.json": "{}", ".env": "TOKEN=hf_secret",
        "metrics.jsonl": "{}", "student/.env": "TOKEN=hf_secret", "student/notes.txt": "mine", "student/unet/old.bin": "pickle",
        "student/unet/.token.json": "hf_secret", "student/pairs/x.safetensors": "pairs",
    }  # fmt: skip
    for name, text in kept.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


WHAT = {
    "README.md", "comparison.png", "distill.json", "model_index.json", "recipe.yaml", "samples/001000.png",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip
"""What goes of the run."""


def of(run, name):
    return (run if (run / name).is_file() else run / "student") / name


def push(hub, tmp_path, *arguments, token="hf_standin"):
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env = {
        **keep,
        "HF_ENDPOINT": hub,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "distill_cli", "push", *map(str, arguments), "--repo", REPO]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)


def test_what_arrives_are_the_bytes_of_the_files_and_nothing_else(hub, run, tmp_path):
    """After a broken upload, which commits nothing; the repeat sends what is missing, and a third has nothing to do."""
    hub.refused = 1
    broken = push(hub.url, tmp_path, run)
    assert broken.returncode == 1, broken.stderr
    assert "error: push: someone/digits-in-one-step could not be sent" in broken.stderr
    assert "the same command again sends only the files that the hub does not have whole" in broken.stderr
    assert (hub.repos, len(hub.sent)) == ({REPO: {}}, 1)
    hub.refused, first = 0, list(hub.sent)
    hub.repos[REPO] |= BEFORE
    again = push(hub.url, tmp_path, run, "--json")
    assert again.returncode == 0, again.stderr
    told, there = json.loads(again.stdout), hub.repos[REPO]
    assert set(there) == WHAT | set(BEFORE)
    assert {name: there[name] for name in WHAT - {"README.md"}} == {name: of(run, name).read_bytes() for name in WHAT - {"README.md"}}
    assert told["files"] == {name: len(there[name]) for name in sorted(WHAT)}
    assert (told["commit"], told["made"], told["changed"]) == (hub.sha, False, True)
    assert len(hub.sent) == len(set(hub.sent)) == 3  # weights, and two pictures: none twice
    assert hub.sent[:1] == first
    assert not any(b"hf_secret" in content or b"hf_standin" in content for content in [*there.values(), *hub.blobs.values()])
    card, own = there["README.md"].decode(), (run / "student/README.md").read_text()
    pictures = "".join(f"\n![{said}]({name})\n" for said, name in (
        ("The teacher and the student, from the same noise", "comparison.png"), ("Samples at the end of training", "samples/001000.png"),
    ))  # fmt: skip
    assert f'from_pretrained("{REPO}")' in card
    named = own.replace('"FOLDER"', f'"{REPO}"').replace("--model FOLDER", f"--model {REPO}")
    assert card == named.replace("# tiny-dmd\n", f"# tiny-dmd\n{pictures}")
    third, asked = push(hub.url, tmp_path, run), len(hub.asked)
    assert third.returncode == 0
    assert f"{REPO} was there; its other files are kept; nothing has changed since its last commit" in third.stdout
    assert len(hub.sent) == 3
    assert not any("/commit/" in path for path in hub.asked[asked:])
    refused = push(hub.url, tmp_path, run, "--private")
    assert refused.returncode == 1
    assert f"--private: {REPO} exists and is public" in refused.stderr


def one_line(done, says, hint):
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "hint")) or "Trace" in line]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert says in lines[0]
    assert hint in lines[1]
    assert done.stdout == ""


def test_a_wrong_token_and_no_connection_are_one_line(hub, run, tmp_path):
    one_line(push(hub.url, tmp_path, run, token="hf_wrong"), "does not let this token write", "hf auth login")
    url = hub.url
    hub.shutdown(), hub.server_close()
    one_line(push(url, tmp_path, run), f"push: {REPO} could not be sent (Connect", "the same command again")


def test_offline_and_without_a_token_nothing_is_asked(run, distill, tmp_path, monkeypatch):
    from huggingface_hub import constants

    done = distill("push", run, "--repo", REPO)
    assert (done.code, done.out) == (1, "")
    assert "error: push: HF_HUB_OFFLINE is set, so nothing is sent\nhint: unset it" in done.err
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = distill("push", run, "--repo", REPO)
    assert (done.code, done.out) == (1, "")
    assert "error: push: no token of the Hugging Face hub\nhint: hf auth login, or HF_TOKEN=..." in done.err


def test_a_dry_run_shows_files_target_and_header(run, distill):
    told = distill("push", run, "--repo", REPO, "--dry-run", "--json").json
    assert set(told["files"]) == WHAT
    assert told["header"] == header.header_of((run / "student/README.md").read_text())
    assert distill("push", run, "--repo", REPO, "--dry-run").out.count("if it is not there yet") == 0
    shown = distill("push", run, "--repo", REPO, "--dry-run", "--private")
    assert shown.code == 0
    assert "license: apache-2.0" in shown.out
    assert f"huggingface.co/{REPO}, private if it is not there yet" in shown.out
    assert "recipe.yaml and the card name paths of this machine: pairs /home/me/pairs" in shown.err
    assert (
        "5 files are no part of the model and do not go: .env, notes.txt, pairs/x.safetensors, unet/.token.json, unet/old.bin" in shown.err
    )


def test_a_models_folder_and_a_lora(run, distill, tmp_path):
    """Of a model's folder go its own files; of a LoRA, which has no model_index.json, weights, scheduler, distill.json and card."""
    told = distill("push", run / "student", "--repo", REPO, "--dry-run", "--json").json
    assert set(told["files"]) == WHAT - {"recipe.yaml", "comparison.png", "samples/001000.png"}
    lora = {"distill.json", "README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"}
    for name in {*lora, "unet/diffusion_pytorch_model.safetensors", "optimizer.pt"}:
        (tmp_path / "lora/student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lora/student" / name).write_text('{"lora": {"base": "/home/me/base"}}' if name == "distill.json" else "x")
    told = distill("push", "lora", "--repo", REPO, "--dry-run", "--json")
    assert set(told.json["files"]) == lora
    assert "the LoRA's base is a path of this machine, /home/me/base" in told.err
    (tmp_path / "lora/student/README.md").unlink()
    assert "README.md: missing" in distill("push", "lora", "--repo", REPO, "--dry-run").err


def test_what_is_no_model_is_refused(distill, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("command: dmd")
    (tmp_path / "other").mkdir()
    for arguments, code, says in (
        (("gone", "--repo", REPO), 2, "gone: no such folder"),
        (("run", "--repo", REPO), 1, "run: a run without a model"),
        (("other", "--repo", REPO), 1, "other: no model that distill has written"),
        (("run", "--repo", "name"), 2, "--repo name: not of the form OWNER/NAME"),
        (("run", "--repo", "a/b/c"), 2, "--repo a/b/c: not of the form OWNER/NAME"),
    ):
        done = distill("push", *arguments, "--dry-run")
        assert (done.code, done.out) == (code, "")
        assert f"error: {says}" in done.err


def test_the_hubs_library_is_not_imported_before():
    """Nor is torch."""
    code = (
        "import sys; from distill_cli.cli.app import run; run(['push', 'gone', '--repo', 'a/b']);"
        "assert not {'huggingface_hub', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
