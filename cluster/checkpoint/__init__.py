"""Checkpoints: both columns on disk, whole or not at all."""
