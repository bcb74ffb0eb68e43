"""Latent consistency distillation (Luo et al. 2310.04378)."""
