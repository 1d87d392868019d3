"""Checkpoints -> numbers."""
