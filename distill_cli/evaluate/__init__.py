"""How good images are: distances in a classifier's features, and their report."""
