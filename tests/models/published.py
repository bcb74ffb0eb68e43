"""Files in the published layouts, written as NVlabs' and OpenAI's programs of 2022 wrote them."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict

import torch


class EasyDict(dict):
    __module__, __qualname__ = "dnnlib.util", "EasyDict"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called by our reader")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An object of a persistence-decorated class: it pickles its source, class name and attributes."""

    source = "raise SystemExit('module source was executed')"

    def __init__(self, class_name, state):
        self.class_name, self.attributes = class_name, state

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=self.class_name, state=self.attributes)
        return (_reconstruct_persistent_obj, (meta,), None)


def module(parameters=(), buffers=(), modules=(), **more):
    return {
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict([*buffers, ("scratch", torch.zeros(3))]),  # a buffer that no state dict has
        "_non_persistent_buffers_set": {"scratch"},
        "_backward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules),
        **more,
    }


def tree(tensors, class_name, **more):
    """Nested persistent objects of dotted names; `enc` and `dec` are torch's ModuleDict."""
    children, parameters, buffers = OrderedDict(), [], []
    for name, value in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            children.setdefault(head, OrderedDict())[rest] = value
        elif head in ("resample_filter", "freqs"):
            buffers.append((head, value))
        else:
            parameters.append((head, torch.nn.Parameter(value, requires_grad=False)))
    modules = []
    for name, inner in children.items():
        if name in ("enc", "dec"):
            container = torch.nn.ModuleDict()
            container.__dict__.update(module(modules=[(k, v) for k, v in tree(inner, "").attributes["_modules"].items()]))
            modules.append((name, container))
        else:
            modules.append((name, tree(inner, "UNetBlock")))
    return Persistent(class_name, module(parameters, buffers, modules, **more))


def dump(data, path):
    """Pickle with the names that NVlabs' modules have."""
    util, persistence = types.ModuleType("dnnlib.util"), types.ModuleType("torch_utils.persistence")
    util.EasyDict, persistence._reconstruct_persistent_obj = EasyDict, _reconstruct_persistent_obj
    extra = {
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
    }
    sys.modules.update(extra)
    try:
        path.write_bytes(pickle.dumps(data, protocol=4))
    finally:
        for name in extra:
            del sys.modules[name]
    return path


def write_nvlabs(tensors, init_kwargs, path):
    """{"ema": EDMPrecond(**init_kwargs)} whose tensors have names like model.enc.16x16_conv.weight."""
    network = tree(tensors, "EDMPrecond", _init_args=(), _init_kwargs=EasyDict(init_kwargs), img_resolution=init_kwargs["img_resolution"])
    return dump({"ema": network, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}), "dataset_kwargs": EasyDict(path="x")}, path)


def nvlabs_shapes(k):
    """name -> shape of a published network, written down from the layouts of the golden files."""
    adm = k["model_type"] == "DhariwalUNet"
    defaults = {
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "encoder_type": "standard",
        "embedding_type": "positional",
        "augment_dim": 0,
        "label_dim": 0,
    }
    k = {**defaults, **k}
    mc, out, width = k["model_channels"], {}, k["model_channels"] * k["channel_mult_noise"]
    emb, taps = 4 * mc, len(k["resample_filter"])

    def conv(name, cout, cin, size):
        out[f"{name}.weight"], out[f"{name}.bias"] = (cout, cin, size, size), (cout,)

    def linear(name, cout, cin, bias=True):
        out[f"{name}.weight"] = (cout, cin)
        if bias:
            out[f"{name}.bias"] = (cout,)

    def norm(name, c):
        out[f"{name}.weight"], out[f"{name}.bias"] = (c,), (c,)

    def block(name, cin, cout, attend=False, resample=False):
        norm(f"{name}.norm0", cin)
        conv(f"{name}.conv0", cout, cin, 3)
        linear(f"{name}.affine", cout * (2 if adm else 1), emb)
        norm(f"{name}.norm1", cout)
        conv(f"{name}.conv1", cout, cout, 3)
        if cin != cout or (resample and not adm):
            conv(f"{name}.skip", cout, cin, 1)
        if resample:
            out[f"{name}.conv0.resample_filter"] = out[f"{name}.skip.resample_filter"] = (1, 1, taps, taps)
        if attend:
            norm(f"{name}.norm2", cout)
            conv(f"{name}.qkv", 3 * cout, cout, 1)
            conv(f"{name}.proj", cout, cout, 1)

    if k["label_dim"]:
        linear("map_label", emb if adm else width, k["label_dim"], not adm)
    if k["augment_dim"]:
        linear("map_augment", mc if adm else width, k["augment_dim"], False)
    linear("map_layer0", emb, mc if adm else width)
    linear("map_layer1", emb, emb)
    if k["embedding_type"] == "fourier":
        out["map_noise.freqs"] = (width // 2,)
    mults, size, c = k["channel_mult"], k["img_resolution"], mc * (k["channel_mult"][0] if adm else 1)
    conv(f"enc.{size}x{size}_conv", c, k["img_channels"], 3)
    skips, aux = [c], k["img_channels"]
    for level, mult in enumerate(mults):
        res = size >> level
        if level:
            block(f"enc.{res}x{res}_down", c, c, resample=True)
            if k["encoder_type"] == "residual":
                conv(f"enc.{res}x{res}_aux_residual", c, aux, 3)
                out[f"enc.{res}x{res}_aux_residual.resample_filter"] = (1, 1, taps, taps)
                aux = c
            skips.append(c)
        for i in range(k["num_blocks"]):
            block(f"enc.{res}x{res}_block{i}", c, mc * mult, res in k["attn_resolutions"])
            c = mc * mult
            skips.append(c)
    for level, mult in reversed(list(enumerate(mults))):
        res = size >> level
        if level == len(mults) - 1:
            block(f"dec.{res}x{res}_in0", c, c, True)
            block(f"dec.{res}x{res}_in1", c, c)
        else:
            block(f"dec.{res}x{res}_up", c, c, resample=True)
        for i in range(k["num_blocks"] + 1):
            attend = res in k["attn_resolutions"] and (adm or i == k["num_blocks"])
            block(f"dec.{res}x{res}_block{i}", c + skips.pop(), mc * mult, attend)
            c = mc * mult
    if adm:
        norm("out_norm", c)
        conv("out_conv", k["img_channels"], c, 3)
    else:
        norm(f"dec.{size}x{size}_aux_norm", c)
        conv(f"dec.{size}x{size}_aux_conv", k["img_channels"], c, 3)
    return {f"model.{name}": shape for name, shape in out.items()}


def openai_shapes(channels, mults, blocks, attention, classes, scale_shift=True):
    """name -> shape of OpenAI's UNet with resampling residual blocks, written down from the golden file's layout."""
    out, emb = {}, 4 * channels

    def pair(name, *shape):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    def residual(name, cin, cout):
        pair(f"{name}.in_layers.0", cin)
        pair(f"{name}.in_layers.2", cout, cin, 3, 3)
        pair(f"{name}.emb_layers.1", cout * (2 if scale_shift else 1), emb)
        pair(f"{name}.out_layers.0", cout)
        pair(f"{name}.out_layers.3", cout, cout, 3, 3)
        if cin != cout:
            pair(f"{name}.skip_connection", cout, cin, 1, 1)

    def attend(name, c):
        pair(f"{name}.norm", c)
        pair(f"{name}.qkv", 3 * c, c, 1, 1)
        pair(f"{name}.proj_out", c, c, 1, 1)

    pair("time_embed.0", emb, channels)
    pair("time_embed.2", emb, emb)
    if classes:
        out["label_emb.weight"] = (classes, emb)
    pair("input_blocks.0.0", channels, 3, 3, 3)
    c, skips, i = channels, [channels], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            residual(f"input_blocks.{i}.0", c, channels * mult)
            c = channels * mult
            if attention[level]:
                attend(f"input_blocks.{i}.1", c)
            skips.append(c)
            i += 1
        if level < len(mults) - 1:
            residual(f"input_blocks.{i}.0", c, c)
            skips.append(c)
            i += 1
    residual("middle_block.0", c, c)
    attend("middle_block.1", c)
    residual("middle_block.2", c, c)
    i = 0
    for level, mult in reversed(list(enumerate(mults))):
        for k in range(blocks + 1):
            residual(f"output_blocks.{i}.0", c + skips.pop(), channels * mult)
            c = channels * mult
            if attention[level]:
                attend(f"output_blocks.{i}.1", c)
            if level and k == blocks:
                residual(f"output_blocks.{i}.{2 if attention[level] else 1}", c, c)
            i += 1
    pair("out.0", c)
    pair("out.2", 3, c, 3, 3)
    return out


CIFAR10 = dict(
    img_resolution=32, img_channels=3, label_dim=10, model_type="SongUNet", embedding_type="positional", encoder_type="standard",
    decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1], model_channels=128, channel_mult=[2, 2, 2], augment_dim=9,
    num_blocks=4, attn_resolutions=[16],
)  # fmt: skip
IMAGENET64 = dict(
    img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4],
    num_blocks=3, attn_resolutions=[32, 16, 8],
)  # fmt: skip
