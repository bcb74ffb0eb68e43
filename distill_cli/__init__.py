"""distill: turn a pretrained diffusion model into a generator of one or a few steps."""

__version__ = "0.1.0"
