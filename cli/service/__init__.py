"""hostler as a systemd service: the unit (`unit`), talking to systemd (`systemd`), the commands (`actions`)."""
