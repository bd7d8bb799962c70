"""What serves on CUDA devices beside transformers' definition. Above: `eager.py`, which opens it where there is a GPU.

`graphs.py` records decode steps, `fused.py` is what it records, `kernels.py` and `paged_attention.py` are Triton,
`sampling.py` chooses tokens where the logits are. Nothing here is needed to serve, and everything is compared with the
definition first.
"""
