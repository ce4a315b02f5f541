"""Dialogues as data: read from any shape, described, and curated."""
