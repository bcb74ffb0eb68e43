"""Real images (built-in sets and folders) and prompts."""

from distill_cli.data.images import Images, open_images

__all__ = ["Images", "open_images"]
