"""Published models by name, from a server on this machine."""

import http.server
import threading

import pytest

from distill_cli.errors import DistillError
from distill_cli.models import load
from distill_cli.models.sources import published
from tests.models.published import write_nvlabs
from tests.models.test_convert import SMALL, random_tensors


class Handler(http.server.BaseHTTPRequestHandler):
    content, cut, asked, whole = b"", None, [], False

    def do_GET(self):
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(begin)
        begin = 0 if self.whole else begin
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.end_headers()
        self.wfile.write(self.content[begin : self.cut])
        Handler.cut = None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.asked, Handler.cut = [], None
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    address = f"http://127.0.0.1:{server.server_port}/x.pkl"
    monkeypatch.setitem(published.PUBLISHED, "edm-cifar10", published.Published(address, 1, "test"))
    Handler.content = write_nvlabs(random_tensors(SMALL), SMALL, tmp_path / "x.pkl").read_bytes()
    yield server
    server.shutdown()


def test_a_cut_download_goes_on_and_is_converted_once(server, capsys):
    Handler.cut = 10_000
    with pytest.raises(DistillError, match="ended after 10000 of") as error:
        load("edm-cifar10")
    assert "goes on from there" in error.value.hint
    model = load("edm-cifar10")
    assert Handler.asked == [0, 10_000]
    assert (model.lineage.name, model.sampling.steps, model.shape) == ("edm-cifar10", 18, (3, 8, 8))
    again = load("edm-cifar10")
    assert Handler.asked == [0, 10_000]
    assert again.weights_hash() == model.weights_hash()
    assert "about 1 MB, licence" in capsys.readouterr().err


def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch, distill):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    for command in ("dmd", "pairs"):
        result = distill(command, "--recipe", f"imagenet64-{command}", "--dry-run")
        assert result.code == 0
        assert "#   download: edm-imagenet64: about 1184 MB from https://" in result.out
    assert not (tmp_path / "cache").exists()


def test_a_download_that_the_server_begins_anew(server, tmp_path):
    """A part that is there and a server that ignores Range: the file is the server's, not both after one another."""
    Handler.whole = True
    path = tmp_path / "d/x.pkl"
    path.parent.mkdir()
    (tmp_path / "d/x.pkl.part").write_bytes(b"x" * 100)
    try:
        published.download(f"http://127.0.0.1:{server.server_port}/x.pkl", path, "test")
    finally:
        Handler.whole = False
    assert path.read_bytes() == Handler.content


def test_a_damaged_download_says_which_file_to_delete(server, tmp_path):
    Handler.content = b"<html>no such thing</html>"
    with pytest.raises(DistillError) as error:
        load("edm-cifar10")
    assert f"delete {tmp_path / 'cache/downloads/x.pkl'}" in error.value.hint


def test_without_a_network_one_line_says_how_to_get_it(tmp_path, monkeypatch, distill):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    for offline in ("1", "true", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        monkeypatch.setitem(published.PUBLISHED, "edm-cifar10", published.Published("http://127.0.0.1:9/edm-cifar10.pkl", 223, "test"))
        shown = distill("models", "show", "edm-cifar10")  # fetches nothing
        assert shown.code == 0
        assert "MIT (OpenAI)" in shown.out
        result = distill("sample", "--model", "edm-cifar10")
        assert result.code == 1
        assert (
            "curl -L -O http://127.0.0.1:9/edm-cifar10.pkl (edm-cifar10: about 223 MB, licence MIT (OpenAI)), then distill convert"
            in result.err
        )


def test_sizes_are_those_of_the_networks():
    """The stated megabytes against the published architectures' parameter counts, at 4 bytes each."""
    import torch

    from distill_cli.models.sources.convert import nvlabs_network
    from tests.models.published import CIFAR10, IMAGENET64

    ve = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
    ffhq = {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2]}
    kinds = {
        "edm-cifar10": CIFAR10,
        "edm-cifar10-ve": CIFAR10 | ve,
        "edm-ffhq64": CIFAR10 | ffhq,
        "edm-afhqv2-64-ve": CIFAR10 | ffhq | ve,
        "edm-imagenet64": IMAGENET64,
    }
    for name, kwargs in kinds.items():
        with torch.device("meta"):
            _, network = nvlabs_network(kwargs)
        size = sum(p.numel() for p in network.parameters()) * 4 / 1e6
        assert published.PUBLISHED[name].megabytes == pytest.approx(size, abs=1), name
