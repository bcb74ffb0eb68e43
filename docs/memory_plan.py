"""The plan's count of activations against real ones on the CPU, at Stable Diffusion 1.5's size: python -m docs.memory_plan [PICTURES...]

Counted are, of real calls in float32 with gradient: the different storages that autograd saves (torch's saved-tensor hooks; weights left
out), and the most bytes that tensors held at once, forward and backward together, the weights' gradients left out. Takes up to 16 GiB and
several minutes for each row of four pictures.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.models.cost import sketch
from distill_cli.training.activations import GPU, Held, peak
from distill_cli.training.placed import able

GIB = 2**30


def real(call: Callable[[], Tensor], network: nn.Module, backward: bool) -> tuple[int, int]:
    """Bytes that autograd saved, and the most that tensors held at once, of a call; with its backward pass if wanted."""
    weights = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}

    def pack(each: Tensor) -> Tensor:
        storage = each.untyped_storage()
        saved.update({} if storage._cdata in weights else {storage._cdata: storage.nbytes()})
        return each

    held = Held()
    for each in (*network.parameters(), *network.buffers()):
        held.know(each, 0)
    with held:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            out = call()
        if backward:
            handles = [each.register_post_accumulate_grad_hook(_dropped) for each in network.parameters() if each.requires_grad]
            out.sum().backward()
            for handle in handles:
                handle.remove()
    return sum(saved.values()), held.peak


def _dropped(weight: Tensor) -> None:
    weight.grad = None


def row(
    what: str, network: Any, inputs: Callable[[Any], tuple[Any, ...]], trained: bool, checkpointed: bool, backward: bool = True
) -> None:
    """A row of the table."""
    parameters = list(network.parameters()) if trained else []
    planned = peak(lambda: network(*inputs(GPU)), [network], parameters, "no", [network] if checkpointed else [])
    network.requires_grad_(trained)
    for part in able(network) if checkpointed else []:
        part.enable_gradient_checkpointing()
    saved, most = real(lambda: network(*inputs(torch.device("cpu"))), network, backward)
    for part in able(network) if checkpointed else []:
        part.disable_gradient_checkpointing()
    figures = " | ".join(f"{each / GIB:.2f} GiB" for each in (planned, saved, most))
    print(f"| {what} | {figures} | {planned / (most if backward else saved):.3f} |", flush=True)
    gc.collect()


class Decoder(nn.Module):
    """A codec's way from latents to pictures, as a network."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.codec, self.vae = codec, codec.vae

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.codec.raw(x)
        return out


def main(counts: list[int]) -> None:
    model = sketch("sd15")
    for network in (model.denoiser, model.codec.vae):  # zeros: what is held does not depend on the weights
        for part in network.modules():
            for table in (part._parameters, part._buffers):
                filled: dict[str, Any] = {name: nn.Parameter(torch.zeros(each.shape)) for name, each in table.items() if each is not None}
                table.update(filled)
    unet = model.backbone

    def inputs(count: int) -> Callable[[Any], tuple[Any, ...]]:
        return lambda where: (torch.zeros(count, *model.shape, device=where), torch.ones(count, device=where), model.example(count, where))

    print("| | planned | saved by autograd | held at once | planned over counted |\n|---|---|---|---|---|")
    row("decoder, 1 picture of 256x256", Decoder(model.codec), _latents, False, False)
    for count in counts:
        row(f"UNet, {count} of 64x64 latents", unet, inputs(count), True, False, backward=count == 1)
        row(f"UNet, {count}, gradient_checkpointing", unet, inputs(count), True, True)


def _latents(where: Any) -> tuple[Tensor]:
    return (torch.zeros(1, 4, 32, 32, device=where, requires_grad=True),)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [1, 4])
