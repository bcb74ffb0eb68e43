"""Pretrained networks as Model: `load` is the only way in, `formats.save` the only way out."""

from distill_cli.models.sources.registry import load

__all__ = ["load"]
