"""Embedding and reranking models over transformers' definitions, batched across requests."""
