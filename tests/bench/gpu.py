"""`make gpu`: the tests that need a CUDA device, where torch finds one; elsewhere a notice and success.

Above: the Makefile. Below: pytest. There is no GPU benchmark yet.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    """Run the tests marked `gpu`; return the exit status."""
    import torch

    if not torch.cuda.is_available():
        print("This machine has no CUDA device that torch can use: the GPU tests were not run.")
        return 0
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}  {torch.cuda.get_device_name(index)}")
    status = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/workers", *sys.argv[1:]], check=False)
    if status.returncode == 5:  # pytest's word for: nothing was selected
        print("There is a CUDA device, but no test is marked gpu yet: nothing was checked on it.")
        return 1
    return status.returncode


if __name__ == "__main__":
    sys.exit(main())
