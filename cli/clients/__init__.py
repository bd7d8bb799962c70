"""Configurations of the clients that people use: what each wants to read, as data. Above: `cli.connect`."""
