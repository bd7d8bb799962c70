"""Room `gateway`; its README is the design note."""
