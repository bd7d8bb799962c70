"""The OpenAI speech dialect, both ways. Pure functions."""
