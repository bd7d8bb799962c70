"""OpenAI's chat completions: `request` parses, `stream` and `reply` encode. Pure functions; no I/O, no HTTP library."""
