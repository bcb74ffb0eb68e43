"""Batch sampling."""
