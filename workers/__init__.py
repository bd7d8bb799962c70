"""Room `workers`; its README is the design note."""
