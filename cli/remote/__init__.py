"""`hostler remote`: a server on another machine, at a port of this one, over the system's own ssh."""
