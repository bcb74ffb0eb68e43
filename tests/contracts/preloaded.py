"""Everything that a command imports, for the process that the others are forked from."""

import diffusers
import transformers
from diffusers import ConsistencyModelPipeline, DDPMPipeline, StableDiffusionPipeline

from distill_cli.cli import app
from distill_cli.models import load
from distill_cli.training import engine
from tests.contracts import running

WARM = (diffusers.UNet2DModel, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel)
load("tiny"), load("tiny-sd")  # what is imported only then
