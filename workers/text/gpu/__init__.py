"""What serves on CUDA devices beside transformers' definition. Above: `eager.py`, which opens it where there is a GPU.

`graphs.py` records decode steps, `fused.py` is what it records, `layout.py` how a step reads the cache; `kernels.py`,
`paged_attention.py` and `narrow.py` are Triton; `sampling.py` chooses tokens where the logits are. Nothing here is
needed to serve, and all that makes logits is compared with the definition, or with torch's products, first.
"""
