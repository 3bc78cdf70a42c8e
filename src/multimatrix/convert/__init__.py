"""Checkpoints of other formats, both ways: folder to folder, one tensor at a time, no model built."""
