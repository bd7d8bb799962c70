"""OpenAI's responses: `request` parses, `builder` encodes. Pure functions and state; no I/O, no HTTP library."""
