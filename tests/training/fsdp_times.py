"""What a network gets under FSDP, a process of several: torchrun --nproc-per-node N fsdp_times.py cpu|cuda (test_arithmetic, docs/gpu.sh).

Needs ACCELERATE_USE_FSDP=true and FSDP_VERSION=2. Prints the kind of the wrapped network, the types and times that came to the network in
it, and the types that came out.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from distill_cli.data.prompts import chosen
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.methods.dmd.objective import DMD
from distill_cli.models import load
from distill_cli.runs import Run
from distill_cli.training.engine import Engine


def main(device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = DMDConfig(teacher="tiny-sd", device=device, batch_size=4, precision="bf16", lr=1e-3, steps=2, out=Path(folder, "run"))
        objective = DMD(config, load("tiny-sd"), None, chosen("shapes", ""))
        student = objective.trained["student"].module
        engine = Engine(config, objective)
        engine.open(Run.create(config.out, "", "dmd"))
        got, given = [], []
        inner = next(module for module in student.modules() if isinstance(module, UNet2DConditionModel))

        def came(_: Any, args: Any, __: Any) -> None:
            got.append((str(args[0].dtype), args[1].max().item()))

        inner.register_forward_pre_hook(came, with_kwargs=True)
        outer = objective.trained["student"].module
        outer.register_forward_hook(lambda module, args, out: given.append(str(out.dtype)))
        engine.train_step()
        sys.stdout.write(f"SEEN {type(outer).__name__} {got} {given}\n")  # in one piece: two processes write


if __name__ == "__main__":
    main(sys.argv[1])
