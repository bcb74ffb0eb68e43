"""Progressive distillation (Salimans & Ho 2202.00512)."""
