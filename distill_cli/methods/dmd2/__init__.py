"""Improved distribution matching distillation (Yin et al. 2405.14867): students of few steps, without pairs."""
