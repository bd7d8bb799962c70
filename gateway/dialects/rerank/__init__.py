"""The reranking dialect that Cohere and Jina share, both ways. Pure functions."""
