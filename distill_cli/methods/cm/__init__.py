"""Consistency models (Song et al. 2303.01469 and successors)."""
