"""Trains a latent text-to-image teacher and its text encoder from captioned pictures (Rombach et al. 2112.10752)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.data.images import Captioned, Images
from distill_cli.diffusion.condition import Condition, dropped
from distill_cli.diffusion.denoiser import NetworkDenoiser
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.schedule import NoiseSchedule, TableSchedule
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.launch import preparing
from distill_cli.methods.train.config import TrainConfig
from distill_cli.methods.train.denoising import SCHEDULES, TeacherObjective
from distill_cli.models.codec import VAECodec
from distill_cli.models.conditioners import PromptConditioner
from distill_cli.models.lineage import Lineage
from distill_cli.models.model import Model
from distill_cli.models.schedulers import STABLE_DIFFUSION
from distill_cli.models.stable_diffusion import create, load_vae
from distill_cli.models.text import make_tokenizer
from distill_cli.runs import Run
from distill_cli.training.identity import digest
from distill_cli.training.objective import Full
from distill_cli.training.source import Latents


class TextDenoiser(nn.Module):
    """The network that is trained: a denoiser with its text encoder. Its condition is tokens, `input_ids` (B, L)."""

    def __init__(self, denoiser: NetworkDenoiser, encoder: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.encoder = denoiser, encoder

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoiser(x, t, Condition({PromptConditioner.part: self.encoder(**condition.parts)[0]}))


class TextToImage(TeacherObjective):
    """Denoising of latents under captions."""

    images: Captioned
    order: Order

    def __init__(self, config: TrainConfig, images: Images) -> None:
        if config.vae is None or not isinstance(images, Captioned):
            raise UsageError(f"--data {config.data}: has no captions", "a text-to-image teacher needs them: data=shapes")
        super().__init__(config, "teacher")
        vae = load_vae(config.vae)
        tokenizer = make_tokenizer(images.captions(range(len(images))), config.text.length)
        parts = 2 ** (len(config.network.channels) - 1)
        if images.shape[-1] // VAECodec(vae).factor % parts:
            several = f"the autoencoder and {len(config.network.channels)} network.channels"
            raise UsageError(f"resolution {images.shape[-1]}: {several} do not divide it")
        scheduler: dict[str, Any] | None = None
        if config.prediction == "flow":
            schedule: NoiseSchedule = SCHEDULES["flow"](config)
        else:
            scheduler = {"_class_name": "DDIMScheduler", **STABLE_DIFFUSION, "beta_schedule": config.beta_schedule, "clip_sample": False}
            scheduler |= {"steps_offset": 1, "timestep_spacing": "trailing", "rescale_betas_zero_snr": config.prediction == "v"}
            schedule = TableSchedule.from_config(scheduler)
        self.teacher = create(
            vae=vae,
            tokenizer=tokenizer,
            pixels=images.shape[-1],
            network=config.network,
            text=config.text,
            schedule=schedule,
            scheduler=scheduler,
            parameterisation=config.prediction,
            lineage=Lineage(name=config.data, method="denoising", data=config.data),
            guidance_scale=config.guidance_scale,
            solver=schedule.usual_solver,
            seed=config.seed,
        )
        made: Any = self.teacher.conditioner
        self.conditioner: PromptConditioner = made
        (self.reader,) = made.readers.values()
        self.schedule = self.teacher.denoiser.schedule
        self.images = images
        self.latents: Latents | None = None
        self.prompts = images.captions(range(0, len(images), max(1, len(images) // 40)))
        self.tokens = self.reader.tokens(images.captions(range(len(images))))
        self.empty = Condition({"input_ids": self.reader.tokens([""])})
        self.trained["teacher"] = Full(TextDenoiser(self.teacher.denoiser, self.reader.encoder).train(), config.lr)
        self.frozen["vae"] = vae
        self.identity["vae"] = digest(vae)
        self.order = Order(config.seed, config.variants * len(images))

    def prepare(self, where: torch.device, run: Run) -> None:
        """Encode all pictures."""
        with preparing(where, f"resume with --resume {run.folder}") as stop:
            self.latents = Latents(self.images, self.teacher.codec, where, self.config.variants, self.config.seed, stop)

    def batch(self, draws: Draws) -> tuple[Tensor, Condition]:
        """Latents (B, c, h, w) and the tokens (B, L) of their captions; a share of the captions is empty."""
        assert self.latents is not None
        positions = [self.order[i] for i in draws.indices]
        tokens = Condition({"input_ids": self.tokens[[position % len(self.images) for position in positions]]})
        tokens = dropped(tokens, self.empty, draws.uniform("label_dropout"), self.config.label_dropout)
        x = self.latents.batch(positions, draws.normal("augment", self.teacher.shape))
        return sent(x, self.device), tokens.to(self.device)

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        assert isinstance(network, TextDenoiser)
        text = network.encoder(torch.zeros(count, *self.tokens.shape[1:], dtype=torch.long, device=where))[0]
        backbone: Any = network.denoiser.network
        x, t = torch.empty(count, *made.shape, device=where), torch.ones(count, device=where)
        return backbone(x, t, Condition({PromptConditioner.part: text}))

    def model(self, network: nn.Module, step: int) -> Model:
        assert isinstance(network, TextDenoiser)
        trained = PromptConditioner(self.reader.tokenizer, network.encoder).given(self.prompts)
        return replace(self.teacher, denoiser=network.denoiser, conditioner=trained)
