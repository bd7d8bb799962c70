"""The OpenAI dialect of transcriptions and translations, both ways. Pure functions."""
