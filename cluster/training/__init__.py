"""One process's training, without Ray."""
