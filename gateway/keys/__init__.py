"""API keys: whose request it is, what its key may do, and how much of it."""
