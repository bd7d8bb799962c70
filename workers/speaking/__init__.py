"""Text to speech. Its README is the design note."""
