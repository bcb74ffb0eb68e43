"""distill bench: what distill adds to the bare network calls."""
