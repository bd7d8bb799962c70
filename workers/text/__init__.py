"""The text engine: continuous batching over transformers' model definitions. See README.md for its loop."""
