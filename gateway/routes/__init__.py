"""HTTP routes: each file reads requests of one kind, asks the services, and answers. Above: `app`."""
