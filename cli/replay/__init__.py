"""What clients send, as data, and what they need to get back. Above: `cli.doctor_client`, and tests of the gateway."""
