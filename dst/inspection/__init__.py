"""What `python -m dst` does: read any checkpoint, and say how sparse it is and how two differ."""
