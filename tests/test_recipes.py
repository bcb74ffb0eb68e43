"""Recipes: precedence, all errors at once, nearest keys; and every recipe that ships is right."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from distill_cli import recipes
from distill_cli.commands import COMMANDS, config_of, kinds
from distill_cli.config import PairsConfig, SampleConfig
from distill_cli.diffusion.schedule import EDMSchedule
from distill_cli.errors import UsageError
from distill_cli.methods.cm.config import CMConfig
from distill_cli.methods.cm.objective import own_times
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.train.config import TrainConfig
from distill_cli.models.sources.catalog import HUB
from tests.options import options

TOP = Path(__file__).parent.parent


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_right_and_opens_with_its_command(name):
    recipes.check(name)
    lines = recipes.describe(recipes.find(name)).splitlines()
    assert lines[0].startswith(f"distill {recipes.read(recipes.find(name))['command']} --recipe {name}")
    assert any(line.startswith("Cost: ") for line in lines)


def _memory(name):
    """What the comment of a recipe says of its memory: the match of MEMORY."""
    return MEMORY.search(recipes.describe(recipes.find(name)))


MEMORY = re.compile(r"^Memory: (?:about )?([\d.]+) GB on (?:the card|one GPU|each of 8 GPUs)(?:, ([\d.]+) of them activations)?", re.M)
NAMED = [name for name in recipes.names() if "Memory: " in recipes.describe(recipes.find(name))]
PLANNED = [
    name for name in NAMED if "--dry-run" in recipes.describe(recipes.find(name)) and getattr(recipes.check(name), "teacher", None) in HUB
]
"""Recipes whose plans can be counted again, on sketches of their teachers."""
ALWAYS = ("z-image-dmd-lora", "sd15-dmd")
"""Those that are always counted, 10 seconds each: the first fits its card narrowly. DISTILL_RECIPES=1 counts all."""


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_fits_the_card_that_it_promises(name):
    """By the memory that its comment names; 80 GB where that names no card."""
    cards = re.findall(r"(?:card of|tight on) (\d+) GB", recipes.describe(recipes.find(name))) or [80]
    assert float(_memory(name)[1]) < min(map(int, cards))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLANNED if name in ALWAYS or "DISTILL_RECIPES" in os.environ])
def test_a_recipe_names_the_memory_that_its_plan_counts(name, distill):
    """By the command of its first line with --dry-run, which downloads nothing."""
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("FOLDER").mkdir()
    Image.new("RGB", (1024, 1024)).save("FOLDER/1.png")
    Path("FOLDER/1.txt").write_text("a cat\n")
    done = distill(*recipes.describe(recipes.find(name)).splitlines()[0].split()[1:], "--dry-run")
    counted = re.search(r"about ([\d.]+) GB on a GPU.* activations ([\d.]+) GB", done.out + done.err)
    assert counted, done.err
    for said, found in zip(_memory(name).groups(), counted.groups(), strict=True):
        assert said is None or float(said) == pytest.approx(float(found), abs=0.06)


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", [name for name in recipes.names() if isinstance(recipes.check(name), CMConfig)])
def test_times_of_several_steps_leave_each_something_to_do(name):
    """An index counts the points of the student's own grid: one too high is hardly any noise."""
    _, times = own_times(recipes.check(name), EDMSchedule())
    assert times[0] == pytest.approx(80)
    assert all(0.5 < time < 10 for time in times[1:])


def test_flags_beat_overrides_beat_recipe_beat_defaults(tmp_path):
    path = write(tmp_path, "command: dmd\nlr: 1e-4\nbatch_size: 8\nsteps: 7\n")
    config = recipes.resolve(DMDConfig, path, ["batch_size=16"], {"steps": 11, "seed": None})
    assert (config.lr, config.batch_size, config.steps, config.clip_norm) == (1e-4, 16, 11, 10.0)


def test_published_defaults():
    """2311.18828, appendix: AdamW (0.9, 0.999), decay 0.01, warm-up 500, clip 10, regression 0.25, times 2% to 98%."""
    config = DMDConfig()
    assert (config.betas, config.weight_decay, config.warmup_steps, config.clip_norm) == ((0.9, 0.999), 0.01, 500, 10.0)
    assert (config.lr, config.t_low, config.t_high, config.t_bins) == (5e-5, 0.02, 0.98, 1000)


def test_all_errors_at_once(tmp_path):
    path = write(tmp_path, "command: dmd\nlr: fast\nstepz: 3\nbatch_size: [1]\nprecision: fp8\n")
    with pytest.raises(UsageError) as error:
        recipes.resolve(DMDConfig, path, ["fake_stepz=2", "nonsense", "seed=1", "seed=2"], {"seed": 3})
    text = error.value.message
    assert "r.yaml: unknown key stepz (did you mean steps?)" in text
    assert "unknown key fake_stepz (did you mean fake_steps?)" in text
    assert "nonsense: not of the form key=value" in text
    assert "r.yaml: lr: input should be a valid number" in text
    assert "(got 'fast')" in text
    assert "batch_size" in text
    assert "precision: input should be 'no', 'tf32', 'bf16' or 'fp16' (got 'fp8')" in text
    assert text.count("seed: given twice") == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("command: dmd\nlr: 1\nlr: 2\n", "line 3: key lr is given twice"),
        ("command: [\n", "r.yaml line"),
        ("steps: 3\n", "no recipe"),
        ("command: pairs\n", "made for `distill pairs`, not for `distill dmd`"),
        ("- 1\n", "no recipe"),
        ("command: dmd\nt_low: 0.9\nt_high: 0.1\n", "t_low 0.9 is not below t_high 0.1"),
        ("command: dmd\nregression_weight: 1\n", "regression_weight needs pairs"),
        ("command: dmd\nlr: .nan\n", "lr: input should be"),
        ("command: dmd\nbatch_size: 10\naccumulate: 3\n", "accumulate 3 does not divide batch_size 10"),
        ("command: [dmd]\n", "no recipe"),
        ("command: dmd\nlr: \x01\n", "r.yaml"),
        ("command: dmd\nclasses: 3-x\n", "is not like 0-3,7"),
    ],
)
def test_wrong_recipes_get_one_clear_line(text, says, tmp_path):
    with pytest.raises(UsageError) as error:
        recipes.resolve(DMDConfig, write(tmp_path, text))
    assert says in error.value.message


def test_sections_have_dotted_keys(tmp_path):
    path = write(tmp_path, "command: train\nnetwork:\n  layers: 2\n")
    assert recipes.resolve(TrainConfig, path, ["network.dropout=0.1"]).network.layers == 2
    with pytest.raises(UsageError, match=r"unknown key network.layerz \(did you mean network.layers\?\)"):
        recipes.resolve(TrainConfig, path, ["network.layerz=3"])
    assert recipes.resolve(TrainConfig, path, ["network.channels=32,64,96,128"]).network.attention == [False, True, False, False]
    with pytest.raises(UsageError, match="2 channels but 1 attention"):
        recipes.resolve(TrainConfig, path, ["network.channels=[32, 64]", "network.attention=[true]"])


def test_no_is_no():
    """YAML 1.1 reads a bare `no` as false."""
    assert recipes.resolve(SampleConfig, None, ["precision=no"]).precision == "no"


def test_a_wrong_override_hides_no_other_error():
    with pytest.raises(UsageError) as error:
        recipes.resolve(DMDConfig, None, ["lr=[", "stepz=1"])
    assert "lr line 1" in error.value.message
    assert "stepz" in error.value.message


def test_classes():
    assert recipes.resolve(SampleConfig, None, ["classes=0-2,7"]).classes == [0, 1, 2, 7]
    assert recipes.resolve(SampleConfig, None, ["classes=5"]).classes == [5]


@pytest.mark.parametrize(("command", "method"), [(command, method) for command in COMMANDS for method in kinds(command)])
def test_a_resolved_recipe_runs_again_as_it_stands(command, method, tmp_path):
    config = kinds(command)[method](seed=3)
    for comments in (False, True):
        path = write(tmp_path, recipes.dump(config, comments))
        assert recipes.resolve(config_of(command), path) == config
    described = yaml.safe_load(recipes.dump(config, comments=True))
    assert set(described) == {"command", *type(config).model_fields}


OTHERS = {
    "cd": "scales_end: null\ndecay_over: N\np_mean: -1.1\np_std: 2.0\nstages: null\nq: 2.0\nk: 8.0\nb: 1.0\nnetwork: {head: 32}\n",
    "ct": "time_weights: null\nsolver: heun\nteacher_steps: 1\nguidance_scale: null\np_mean: -1.1\nstages: null\n",
    "ict": "target_decay: null\ndecay_over: N\nsolver: heun\nq: 2.0\n",
    "ect": "scales: null\nscales_end: null\ntarget_decay: null\nsolver: heun\nnetwork: {channels: [32, 64, 64]}\n",
}
"""Keys of other methods as the recipes of runs have them that were made when `cm` had one class of options."""


@pytest.mark.parametrize("method", OTHERS)
def test_recipes_of_earlier_runs_name_the_keys_of_all_methods(method, tmp_path):
    config = options("cm", method=method, data="digits", steps=7)
    assert recipes.resolve(CMConfig, write(tmp_path, recipes.dump(config) + OTHERS[method])) == config
    key, value = {"cd": ("q", 3), "ct": ("solver", "euler"), "ict": ("stages", 4), "ect": ("scales", 20)}[method]
    with pytest.raises(UsageError, match=rf"r.yaml: {key}: not a key of method {method} \((did you mean|known)"):
        recipes.resolve(CMConfig, write(tmp_path, f"{recipes.dump(config)}{key}: {value}\n"))
    default = getattr(options("cm", method={"q": "ect", "solver": "cd", "stages": "ect", "scales": "cd"}[key]), key)
    for given in ({"overrides": [f"{key}={default}"]}, {"flags": {key: str(default)}}):  # on the command line never
        with pytest.raises(UsageError, match=f"{key}: not a key of method {method}"):
            recipes.resolve(CMConfig, flags={"method": method, **given.get("flags", {})}, overrides=given.get("overrides", ()))


def test_a_method_that_is_none_hides_no_other_error(tmp_path):
    path = write(tmp_path, "command: cm\nmethod: cx\nstages: 4\nscales: 3\nstepz: 1\nlr: fast\n")
    with pytest.raises(UsageError) as error:
        recipes.resolve(CMConfig, path)
    said = error.value.message
    assert "r.yaml: method: input should be 'cd', 'ct', 'ict', 'ect' or 'lcm' (got 'cx')" in said
    assert "unknown key stepz" in said
    assert "lr: input should be a valid number" in said
    assert "stages" not in said


def test_copies(tmp_path):
    path = recipes.copy("demo-dmd", tmp_path)
    assert path.read_bytes() == recipes.find("demo-dmd").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        recipes.copy("demo-dmd", tmp_path)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(UsageError) as error:
        recipes.resolve(PairsConfig, "demo-pears")
    assert "did you mean demo-pairs?" in error.value.hint


@pytest.mark.slow
def test_recipes_travel_in_the_wheel(tmp_path):
    """The built wheel, installed in a temporary place, lists the recipes from an empty folder."""
    source = tmp_path / "source"
    shutil.copytree(TOP, source, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache"))
    code = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    inside = zipfile.ZipFile(wheel).namelist()
    assert "distill_cli/models/builtin/digits/unet/diffusion_pytorch_model.safetensors" in inside
    assert "distill_cli/data/digits.safetensors" in inside
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    target = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(target)
    others = next(p for p in sys.path if p.endswith("site-packages"))
    (target / "others.pth").write_text(others + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    python = tmp_path / "venv/bin/python"
    where = subprocess.run(
        [python, "-c", "import distill_cli; print(distill_cli.__file__)"], cwd=empty, check=True, capture_output=True, text=True
    )
    assert str(tmp_path) in where.stdout
    listed = subprocess.run([python, "-m", "distill_cli", "recipes", "ls"], cwd=empty, check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == recipes.names()
