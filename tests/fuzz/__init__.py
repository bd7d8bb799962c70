"""Schemathesis against our own OpenAPI document: `make fuzz`."""
