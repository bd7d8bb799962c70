"""The engine for speech recognition: recordings in, text with times out."""
