"""Training: one engine, one objective a file."""
