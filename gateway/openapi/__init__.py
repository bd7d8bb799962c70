"""What the API is, as an OpenAPI document that is written, not derived: `GET /openapi.json`."""
