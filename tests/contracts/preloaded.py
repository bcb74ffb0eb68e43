"""Imports what commands import, for the process that the others are forked from."""

import gc

import diffusers
import transformers

from distill_cli.cli import app
from distill_cli.models import load
from distill_cli.training import engine
from tests.contracts import running

USED = (app, engine, running, diffusers.UNet2DModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel)
for name in ("tiny", "tiny-sd"):  # what is imported when a model is made
    load(name)
gc.freeze()  # what is imported is there to stay: no collection need look at it
