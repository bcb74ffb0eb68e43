"""A method of three phases, small enough for many runs.

Each round a point learns, from noisy samples, to be half of what its teacher is, and the teacher is the average of the round before.
"""

import torch
from safetensors.torch import save_file
from torch import nn

from distill_cli.files import folder_atomic
from distill_cli.launch import whole
from distill_cli.methods.train.config import TrainConfig
from distill_cli.processes import rank
from distill_cli.runs import Run
from distill_cli.training import checkpoint
from distill_cli.training.ema import follow
from distill_cli.training.engine import Engine
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective, Phase

STEPS = (4, 3, 5)


class Point(nn.Module):
    def __init__(self, value=8.0):
        super().__init__()
        self.where = nn.Parameter(torch.full((4, 2), value))

    def forward(self, noise):
        return self.where.mean(0) + noise


class Saved:
    def __init__(self, network, step):
        self.network, self.step = network, step

    def save(self, folder):
        with folder_atomic(folder) as temporary:
            save_file({"where": self.network.where.detach().clone(), "step": torch.tensor(self.step)}, temporary / "point.safetensors")


class Halving(Objective):
    def __init__(self, config):
        super().__init__(config, "student")
        self.phases = [Phase(steps, name, k > 0) for k, (steps, name) in enumerate(zip(STEPS, ("student-4", "student-2", "student")))]
        self.trained["student"] = Full(Point(), config.lr)
        self.kept["teacher"] = Point().requires_grad_(False)
        self.starts = []

    def before(self, step):
        if step in (4, 7):
            follow(self.kept["teacher"], self.network("student"), 1.0)
            self.starts.append((step, whole(next(self.network("student").parameters()).detach()).clone()))

    def turns(self, step, draws):
        noise = draws.normal("noise", (2,)).to(self.device)
        with torch.no_grad():
            goal = self.kept["teacher"](0.1 * noise) / 2
        yield Loss("student", (self.network("student")(noise) - goal).square().mean())

    def model(self, network, step):
        return Saved(network, step)

    def calls(self, step=0):
        return Calls([Call("student", 4)], [Call("teacher", 4)])


def engine(folder, **changes):
    options = dict(
        steps=sum(STEPS), batch_size=4, lr=0.5, lr_schedule="cosine", warmup_steps=1, ema_halflife=6, sample_every=0, log_every=2
    )
    config = TrainConfig(**options | dict(device="cpu", save_every=1, keep=99, out=folder) | changes)
    made = Engine(config, Halving(config))
    run = Run(folder)
    if rank() == 0:  # as a job does: a second one would be refused the folder
        run = Run.resume(folder) if run.recipe.exists() else Run.create(folder, "", "toy")
    made.open(run)
    return made


def everything(folder):
    """What a finished run has: last weights, moments, the results of all phases, and its metrics."""
    path = checkpoint.path_of(folder / "checkpoints", sum(STEPS))
    files = [*sorted(path.glob("*.safetensors")), *(folder / name / "point.safetensors" for name in ("student-4", "student-2", "student"))]
    moments = torch.load(path / "optimizers.pt", weights_only=True)["student"]["state"][0]
    return {file.parent.name + file.name: file.read_bytes() for file in files} | {
        **{key: value.tolist() for key, value in moments.items()},
        "metrics": (folder / "metrics.jsonl").read_text(),
    }


def trained(folder):
    engine(folder).train()
