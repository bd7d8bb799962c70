"""The OpenAI embeddings dialect, both ways. Pure functions."""
