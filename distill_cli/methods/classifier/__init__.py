"""Training of the classifiers that `distill evaluate` measures in."""
