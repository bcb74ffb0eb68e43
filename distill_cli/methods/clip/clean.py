"""Trains a CLIP model by the contrastive loss of pictures and their captions (Radford et al. 2103.00020, figure 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.data import Images
from distill_cli.data.images import Captioned
from distill_cli.diffusion.noise import Draws, Order
from distill_cli.diffusion.transfer import sent
from distill_cli.errors import UsageError
from distill_cli.methods.clip.config import CLIPConfig
from distill_cli.models.clip import Clip, Towers, create
from distill_cli.models.noisy_clip import MOST
from distill_cli.models.text import make_tokenizer
from distill_cli.training.examples import read_ahead
from distill_cli.training.objective import Call, Calls, Full, Loss, Objective


class Contrast(Objective):
    """Cross-entropy of a picture's caption among the captions of the step's pictures, and of the next ones; equal captions are one.

    This is the half of CLIP's loss that finds the caption of a picture. Captions are known without their pictures, so a step is the same in
    one part or several, and in one process or several. The other half, which finds the picture of a caption, would need all pictures.
    """

    config: CLIPConfig
    images: Captioned
    order: Order

    def __init__(self, config: CLIPConfig, images: Images) -> None:
        if not isinstance(images, Captioned):
            raise UsageError(f"--data {config.data}: has no captions", "a CLIP model learns from them: data=shapes")
        super().__init__(config, "clip")
        self.images = images
        captions = images.captions(range(len(images)))
        self.numbers = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
        self.which = torch.tensor([self.numbers[caption] for caption in captions])
        self.clip = self.begin(make_tokenizer(captions, config.text.length))
        self.tokens = self.clip.reader.tokens(list(self.numbers))
        self.trained["clip"] = Full(self.clip.towers.train(), config.lr)
        self.order = Order(config.seed, len(images))

    def begin(self, tokenizer: Any) -> Clip:
        """The model with random weights. Raises UsageError for patches that do not divide what it sees."""
        self.check_patch("pictures", self.images.shape[-1])
        return create(self.images.shape[-1], self.config.network, self.config.text, tokenizer, self.config.seed)

    def check_patch(self, what: str, pixels: int) -> None:
        if pixels % self.config.network.patch:
            raise UsageError(f"network.patch {self.config.network.patch}: does not divide the {what}' {pixels} pixels")

    def contrast(self, network: Any, x: Tensor, positions: list[int], numbers: list[int]) -> Loss:
        """The loss of what the network sees, x (B, C, H, W), at `positions`; `numbers`: positions whose captions are candidates."""
        candidates = self.which[numbers].unique()
        right = sent(torch.searchsorted(candidates, self.which[positions]), self.device)
        pictures, texts, scale = network(x, sent(self.tokens[candidates], self.device))
        logits = scale.clamp(max=MOST) * (pictures.float() @ texts.float().T)
        accuracy = (logits.argmax(1) == right).float().mean()
        return Loss("clip", F.cross_entropy(logits, right), {"accuracy": accuracy, "scale": scale.detach()})

    def candidates(self, step: int) -> list[int]:
        """Places of the order whose captions are candidates in a step: those of its pictures, and the next ones."""
        first = step * self.config.batch_size
        return [self.order[first + i] for i in range(max(self.config.batch_size, self.config.captions))]

    def moved(self, x: Tensor, draws: Draws) -> Tensor:
        """Pictures moved, enlarged and under noise, each at random; what comes in at the border continues the picture's."""
        u = torch.stack([draws.uniform("augment", 10 + turn) for turn in range(4)], 1).float()  # a set's own draws have the first turns
        scale, place = 1 + self.config.zoom * (2 * u[:, 0] - 1), 2 * self.config.shift * (2 * u[:, 1:3] - 1)
        turn = torch.stack([scale, torch.zeros_like(scale), place[:, 0], torch.zeros_like(scale), scale, place[:, 1]], 1).reshape(-1, 2, 3)
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return moved + self.config.noise * u[:, 3, None, None, None] * draws.normal("noise", x.shape[1:])

    def positions(self, draws: Draws) -> list[int]:
        """Of the captioned pictures of the samples of `draws`."""
        return [self.order[i] for i in draws.indices]

    def ahead(self, step: int, draws: Draws) -> None:
        read_ahead(self.images, self.positions(draws))

    def turns(self, step: int, draws: Draws) -> Iterator[Loss]:
        positions = self.positions(draws)
        x = sent(self.moved(self.images.batch(positions, draws)[0], draws), self.device)
        yield self.contrast(self.network("clip"), x, positions, self.candidates(step))

    def model(self, network: nn.Module, step: int) -> Clip:
        assert isinstance(network, Towers)
        return Clip(network, self.clip.tokenizer)

    def trial(self, network: nn.Module, made: Any, count: int, where: torch.device) -> Any:
        tokens = torch.zeros(count, self.tokens.shape[1], dtype=torch.long, device=where)
        return network(torch.empty(count, *self.images.shape, device=where), tokens)

    def calls(self, step: int = 0) -> Calls:
        return Calls([Call("clip", self.config.batch_size)])
