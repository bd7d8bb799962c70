"""`hostler doctor`: is this machine fit to serve, and would a client work. Above: `cli.main`."""
