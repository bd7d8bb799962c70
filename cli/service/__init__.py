"""The server as a systemd unit: `unit` writes its text, `systemd` asks and orders, `control` decides."""
