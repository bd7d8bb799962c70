"""Says which model types the installed transformers has code of its own for: `python -m workers.architectures TYPE`.

Above it: the model store, which asks at this command line before it takes a repository that brings Python code.
Below it: transformers' own table. Nothing of a model is read, and nothing of it runs.
"""

from __future__ import annotations

import argparse
import json
import sys


def is_known(model_type: str) -> bool:
    """Return whether transformers itself implements `model_type`, as config.json names it."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def main(argv: list[str] | None = None) -> int:
    """Print `{"model_type": …, "known": …}`; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m workers.architectures", description="Is a model type known?")
    parser.add_argument("model_type")
    model_type: str = parser.parse_args(argv).model_type
    sys.stdout.write(json.dumps({"model_type": model_type, "known": is_known(model_type)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
