"""Progressive distillation: a student learns to take two of its teacher's steps in one."""
