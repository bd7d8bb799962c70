"""`hostler service`: the server as a systemd unit. `unit` writes its text, `control` asks systemd."""
