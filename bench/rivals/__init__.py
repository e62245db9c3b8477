"""What one could run instead, each as its own documentation would have it, with the same weights."""
