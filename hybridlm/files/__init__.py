"""What is written so that a crash loses nothing, and read so that a stranger's file can do nothing. Knows nothing of
runs or models."""
