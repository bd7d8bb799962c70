"""Room `orchestrator`; its README is the design note."""
