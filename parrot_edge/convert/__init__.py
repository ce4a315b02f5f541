"""From what training leaves to files that llama.cpp runs: adapters as GGUF, merged models."""
