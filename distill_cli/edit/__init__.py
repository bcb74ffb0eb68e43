"""Zero-shot edits with consistency students."""
