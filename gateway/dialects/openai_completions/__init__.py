"""The OpenAI completions dialect: raw prompts in, `text_completion` objects out. Pure functions."""
