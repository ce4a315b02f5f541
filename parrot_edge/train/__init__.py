"""Training: dialogues become rows of tokens, rows an adapter for the Ask or the Chat role."""
