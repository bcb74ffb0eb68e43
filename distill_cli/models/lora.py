"""Low-rank adapters (LoRA, Hu et al. 2106.09685) on one shared base network, by peft.

Teacher, student, fake score, target and average are one frozen network and as many small adapters. Each call chooses its own: peft's
`set_adapter` would change what is trained, and a block that is computed again in the backward pass would see another adapter than before.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from distill_cli.diffusion.condition import Condition
from distill_cli.errors import UsageError, nearest, reason
from distill_cli.models.backbones import Backbone

EXTRA = "pip install 'distill-cli[lora]'"
PAIR = ("lora_A", "lora_B")


def _layers(net: nn.Module) -> dict[str, Any]:
    """The layers of a network that have adapters, by their names."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "_active_adapter")}


@contextmanager
def chosen(layers: Sequence[Any], names: list[str]) -> Iterator[None]:
    """Have layers add the adapters `names`, and afterwards what they added before. What is trained stays as it is."""
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = names
        yield
    finally:
        for layer, names_before in zip(layers, before, strict=True):
            layer._active_adapter = names_before


def again(layers: Sequence[Any], module: Callable[..., Any], *inputs: Any) -> Any:
    """Gradient checkpointing of one block, which is computed again with the adapter of its first computation."""
    now = layers[0]._active_adapter
    contexts = partial(lambda names: (nullcontext(), chosen(layers, names)), now)
    return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


class Adapter(Backbone):
    """A base network with a LoRA: itself a backbone, whose parameters are the LoRA's alone.

    The base is shared and stays as it is. A copy of an adapter is another adapter on the same base. Names in its state dict are `adapter.`
    and peft's, such as `down_blocks.0.resnets.0.conv1.lora_A.weight`.
    """

    def __init__(self, base: Backbone, rank: int, alpha: float, targets: Sequence[str], seed: int, merge: bool = False) -> None:
        """A LoRA that changes nothing yet: B is 0, and A is drawn by `seed`. `merge`: it is saved as whole weights."""
        nn.Module.__init__(self)
        self.part, self.inputs = base.part, base.inputs
        self.rank, self.alpha, self.targets, self.merge = rank, alpha, tuple(targets), merge
        self.source = ""
        """The name that the base was loaded by."""
        self._shared = [base]  # in a list: the base is no part of the adapter
        number = len(getattr(base.net, "peft_config", {}))
        self.name = f"lora{number}"
        inject(base.net, self.name, rank, alpha, self.targets, seed + number)
        self.adapter = nn.Module()
        for path, layer in _layers(base.net).items():
            if self.name not in layer.scaling:
                continue
            place = self.adapter
            for step in path.split("."):
                if step not in place._modules:
                    place.add_module(step, nn.Module())
                place = place.get_submodule(step)
            for half in PAIR:
                place.add_module(half, getattr(layer, half)[self.name])
        self.every = list(_layers(base.net).values())

    @property
    def base(self) -> Backbone:
        """The shared network: called by itself, it has no adapter."""
        return self._shared[0]

    @property
    def net(self) -> Any:
        return self.base.net

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.base.shape

    @property
    def multiple(self) -> int:
        return self.base.multiple

    @property
    def most(self) -> float:
        return self.base.most

    def tokens(self, shape: tuple[int, int, int]) -> int:
        return self.base.tokens(shape)

    @property
    def comfyui(self) -> str | None:  # type: ignore[override]
        return self.base.comfyui

    @property
    def blocks(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.blocks

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        with chosen(self.every, [self.name]):
            return self.base(x, time, condition)

    def fresh(self, **changes: Any) -> Backbone:
        return self.base.fresh(**changes)

    def middle(self) -> tuple[nn.Module, int]:
        return self.base.middle()

    def features(self, answer: Any, x: Tensor, condition: Condition) -> Tensor:
        return self.base.features(answer, x, condition)

    def told(self) -> Backbone:
        hint = "guidance_scale=S fixes one inside, or train without lora"
        raise UsageError("guidance_range: a LoRA has no place for the scale's embedding", hint)

    def checkpointing(self) -> None:
        self.net.enable_gradient_checkpointing(partial(again, self.every))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        out = Adapter(self.base, self.rank, self.alpha, self.targets, 0, self.merge)
        out.source = self.source
        for own, other in zip(out.parameters(), self.parameters(), strict=True):
            own.data = other.data.clone()
            own.requires_grad_(other.requires_grad)
        memo[id(self)] = out
        return out

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each layer by peft's names, float32 on the CPU; B is multiplied by alpha / rank, so the scale of a file is 1."""
        state = {name: value.detach().float().cpu() for name, value in self.adapter.state_dict().items()}
        scale = self.alpha / self.rank
        return {name: value * scale if f".{PAIR[1]}." in name else value for name, value in state.items()}

    def weights(self) -> dict[str, Tensor]:
        return {**self.base.weights(), **self.tensors()}

    def merged(self) -> Backbone:
        """A network of its own with the LoRA in its weights, float32."""
        net = copy.deepcopy(self.net).float()
        for path, layer in _layers(net).items():
            plain = layer.base_layer
            if self.name in layer.scaling:
                plain.weight.data += layer.get_delta_weight(self.name).to(plain.weight)
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, plain)
        del net.peft_config
        return type(self.base)(net.requires_grad_(False))


def inject(net: nn.Module, name: str, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Add a LoRA called `name` to the layers of a network whose names end in one of `targets`. Afterwards no adapter is chosen.

    Raises UsageError for targets that match nothing, or no layer that can have a LoRA.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("lora: peft is not installed", EXTRA)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # of torchao, which peft imports where it is
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"lora: peft cannot be imported ({reason(error)})", "pip install --upgrade peft") from error

    known = {path.replace(".base_layer", ""): module for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    known = {path: module for path, module in known.items() if not any(half in path for half in PAIR)}
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in known):
            ends = sorted({path.rpartition(".")[2] for path in known} - set("0123456789"))
            raise UsageError(f"lora_targets {target}: no layer of a {type(net).__name__} ends so", nearest(target, ends))
    shapes = [module.weight.shape for path, module in known.items() if any(f".{path}".endswith(f".{target}") for target in targets)]
    most = max(min(shape[0], math.prod(shape[1:])) for shape in shapes)
    if rank > most:
        raise UsageError(f"lora {rank}: more than the rank of any layer of the {type(net).__name__}", f"{most} at most")
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the network has another adapter
        try:
            inject_adapter_in_model(config, net, name)
        except (ValueError, TypeError) as error:
            raise UsageError(f"lora: {reason(error)}", "lora_targets=A,B names others") from error
    net.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for layer in _layers(net).values():
        layer._active_adapter = []
        if name in layer.scaling:
            where = layer.base_layer.weight.device
            for half in PAIR:
                getattr(layer, half)[name].requires_grad_(True).to(where, torch.float32)
            a = layer.lora_A[name].weight
            if not a.is_meta:  # peft would draw it in the base's number type, by the device's own generator
                a.data = nn.init.kaiming_uniform_(torch.empty(a.shape), math.sqrt(5), generator=generator).to(where)


def adapted(base: Backbone, rank: int, alpha: float | None, targets: Sequence[str] | None, seed: int, merge: bool = False) -> Adapter:
    """A LoRA on a backbone, by default with alpha = rank and on the layers of its class. Raises UsageError for targets that do not fit."""
    names = [f".{name}" for name, _ in base.net.named_modules()]
    usual = [target for target in base.lora if any(name.endswith(f".{target}") for name in names)]
    if not targets and not usual:
        raise UsageError(f"lora: no usual layers of a {type(base.net).__name__} are known", "lora_targets=A,B names them")
    return Adapter(base, rank, rank if alpha is None else alpha, targets or usual, seed, merge)
