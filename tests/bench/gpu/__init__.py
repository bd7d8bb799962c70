"""`make gpu`: correctness and speed on one CUDA device, in one call. `__main__` is the entry, `steps` what it runs."""
