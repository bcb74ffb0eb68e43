"""Noise-image pairs: generate and store."""
