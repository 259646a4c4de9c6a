"""The third door: how fast the stream is, stage by stage, and what would make it faster."""
