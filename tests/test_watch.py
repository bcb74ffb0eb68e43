"""The page of a run: what it says, that it holds what it shows, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from distill_cli import watch
from distill_cli.config import DMDConfig
from distill_cli.errors import DistillError, UsageError
from distill_cli.recipes import dump
from distill_cli.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path):
    """A run of 1,000 steps that has come to 300: a spike, a value that is no number, a torn line."""
    run = Run.create(tmp_path / "a <b>run", dump(DMDConfig(steps=1000, batch_size=8)), "dmd")
    for step in range(1, 301):
        loss = 50.0 if step == 137 else 1 / step
        run.log(
            {"step": step, "images": 8 * step, "student_loss": loss, "fake_loss": None if step == 5 else 0.5, "spikes": int(step > 136)}
        )
    with open(run.speed, "w") as handle:
        handle.write(json.dumps({"step": 300, "time": 1.7e9, "images_per_second": 20.0}) + "\n")
    with open(run.metrics, "a") as handle:
        handle.write('{"step": 301, "student')
    for step in range(10, 301, 10):
        Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(run.samples / f"{step:06d}.png")
    (run.samples / "zz.png").write_bytes(b"no grid of ours")
    return run


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_what_the_page_says(run):
    html, done = watch.page(run)
    reader = Reader(html)
    assert not done
    assert "300 of 1,000" in reader.text
    assert "20.0 images a second" in reader.text
    assert f"{700 * 8 / 20 / 3600:.2f} hours" in reader.text
    assert "loss spikes1 so far" in reader.text
    assert "student_loss: 0.003333 at step 300, logarithmic" in reader.text
    assert "fake_loss: 0.5 at step 300" in reader.text
    pictures = reader.all("img")
    assert [a["alt"] for a in pictures] == [f"step {s}" for s in (10, 50, 80, 120, 150, 190, 230, 260, 300)]
    assert len(reader.all("polyline")) == 4  # two losses, spikes, throughput


def test_the_page_needs_nothing_from_outside(run):
    html, _ = watch.page(run)
    addresses = [value for _, attributes in Reader(html).tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "<script" not in html
    assert "url(" not in html


def test_names_are_escaped(run):
    html, _ = watch.page(run)
    assert "a &lt;b&gt;run" in html
    assert "<b>" not in html


def test_a_spike_survives_thinning():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    thin = watch.thinned(points)
    assert len(thin) <= 410
    assert (54_321, 9.0) in thin
    assert thin == sorted(thin)


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0.0, 1.0, [0, 0.5, 1.0]), (0.03, 0.19, [0.05, 0.1, 0.15]), (-7, 45, [0, 20, 40]), (2.0, 2.0, [2.0])]
)
def test_ticks(low, high, wanted):
    assert watch.ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("made", ["comparison.png", "vae"])
def test_a_live_page_loads_itself_again_until_the_run_is_done(made, run):
    assert '<meta http-equiv="refresh" content="7">' in watch.page(run, 7)[0]
    run.forget_after(300)
    run.log({"step": 1000, "images": 8000, "student_loss": 0.1})
    assert not watch.page(run, 7)[1]  # its pictures are not made yet
    if made == "vae":
        (run.folder / made).mkdir()
    else:
        Image.new("RGB", (40, 20)).save(run.folder / made)
    html, done = watch.page(run, 7)
    assert done
    assert "refresh" not in html


def test_a_run_that_has_logged_nothing(tmp_path):
    run = Run.create(tmp_path / "new", dump(DMDConfig()), "dmd")
    assert "Nothing is logged yet" in watch.page(run)[0]
    with pytest.raises(UsageError, match="no run: it has no recipe.yaml"):
        watch.write(tmp_path)
    run.recipe.write_text("a: [")
    with pytest.raises(DistillError, match="not readable as YAML"):
        watch.page(run)


def test_follow_writes_until_the_run_is_done(run, distill, monkeypatch):
    def end(seconds):
        run.forget_after(300)
        run.log({"step": 1000, "images": 8000, "student_loss": 0.1})
        Image.new("RGB", (40, 20)).save(run.folder / "comparison.png")

    monkeypatch.setattr("time.sleep", end)
    found = distill("watch", run.folder, "--follow", "--every", 3, "--json")
    assert found.json == {"page": str(run.folder / "report.html"), "done": True}
    assert "1,000 of 1,000" in (run.folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_page(run, tmp_path):
    """Headless Chromium without a network: the lines are where the numbers say, the pictures are decoded, the page is not empty."""
    path, _ = watch.write(run.folder, tmp_path / "page.html")
    probe = """<script>addEventListener("load", () => {
      const boxes = [...document.querySelectorAll("polyline")].map(line => line.getBBox());
      const images = [...document.images].map(image => image.naturalWidth);
      document.body.dataset.found = JSON.stringify({boxes: boxes.map(b => [b.width, b.height]), images});
    });</script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    flags += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1800", "--virtual-time-budget=3000"]
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r'data-found="([^"]*)"', dom).group(1).replace("&quot;", '"'))
    assert found["images"] == [40] * 9
    loss = found["boxes"][0]
    assert loss[0] == pytest.approx(watch.WIDE - watch.LEFT - 8, abs=1)  # from the first step to the last
    assert loss[1] == pytest.approx((watch.HIGH - watch.BOTTOM - 8) / 1.1, abs=1)  # 5% of air above and below
