"""Spoken dialects: told apart by a small network, trained on one's own recordings, run on a laptop."""
