"""Room `cli`; its README is the design note."""
