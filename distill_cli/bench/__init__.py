"""distill bench: what distill adds to the bare network calls."""

from distill_cli.bench.measure import machine

__all__ = ["machine"]
