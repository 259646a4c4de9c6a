"""Stored bytes to batches, in the order they flow."""
