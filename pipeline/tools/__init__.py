"""What knows nothing of images."""
