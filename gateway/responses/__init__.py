"""What a response is besides its dialect: stored, continued, run in the background, followed. Above: routes."""
