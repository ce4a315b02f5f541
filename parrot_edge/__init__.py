"""parrot_edge: a simulated user and a chat model talk on your own machine, and learn from it."""

__version__ = "0.1.0"
