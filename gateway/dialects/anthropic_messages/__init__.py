"""Anthropic's messages: `request` parses, `builder` encodes. Pure functions; no I/O, no HTTP library."""
