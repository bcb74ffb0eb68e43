"""Conditions of tests."""

from distill_cli.diffusion.condition import Condition


def of(labels):
    """That of class labels (B,)."""
    return Condition({"class_labels": labels})


def labels_of(condition):
    return condition.parts["class_labels"]
