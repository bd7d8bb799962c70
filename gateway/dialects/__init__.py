"""HTTP dialects: each package turns one API's JSON into the inference contract and its events back. Above: routes."""
