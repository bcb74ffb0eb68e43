"""Distribution matching distillation (Yin et al. 2311.18828)."""
