"""Training of teachers from images."""
