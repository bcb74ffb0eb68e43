"""The judge of a CLIP model of shapes: how often a picture's own caption is nearer to it than a wrong one. It opens transformers alone.

    python -m tests.clip_judge FOLDER

Pictures are of captions held back from training, five of each. A wrong caption is any other of the 960, or one that differs in a single
attribute; each picture has one wrong caption of each kind.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import torch

from distill_cli.data.pictures import to_uint8
from distill_cli.data.shapes import BACKGROUNDS, COLOURS, HELD, PLACES, SHAPES, SIZES, THINGS, render

VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES, "background": BACKGROUNDS}
EACH = 5


@torch.no_grad()
def judge(folder: str, seed: int = 7, each: int = EACH) -> dict[str, float]:
    """The shares of pairs in which the right caption is ranked above the wrong one, by the kind of the wrong one."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    chance, jitter = random.Random(seed), torch.Generator().manual_seed(seed)
    things = [thing for thing in HELD for _ in range(each)]
    pictures = to_uint8(torch.stack([render(thing, torch.rand(6, generator=jitter, dtype=torch.float64)) for thing in things]))
    length = model.config.text_config.max_position_embeddings
    options = dict(return_tensors="pt", padding="max_length", max_length=length, truncation=True)
    given = processor(text=[thing.caption for thing in THINGS], images=list(pictures), **options)
    found = model(input_ids=given.input_ids, pixel_values=given.pixel_values)
    scores = (found.image_embeds @ found.text_embeds.T).tolist()
    number = {thing: k for k, thing in enumerate(THINGS)}

    def above(row: list[float], thing, wrong) -> bool:
        return row[number[thing]] > row[number[wrong]]

    right = {"random": [above(row, t, chance.choice([w for w in THINGS if w != t])) for row, t in zip(scores, things, strict=True)]}
    for name, values in VALUES.items():
        wrong = [replace(t, **{name: chance.choice([v for v in values if v != getattr(t, name)])}) for t in things]
        right[name] = [above(row, t, w) for row, t, w in zip(scores, things, wrong, strict=True)]
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    return {"pictures": len(things), **shares, "single": sum(shares[name] for name in VALUES) / len(VALUES)}


if __name__ == "__main__":
    print(json.dumps({"folder": sys.argv[1], **judge(sys.argv[1])}))
