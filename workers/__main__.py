"""`python -m workers`: one worker without Ray, for tests and for looking at it alone."""

from __future__ import annotations

import argparse
import asyncio

from hostler import logs

from workers.server import serve


def main() -> None:
    """Serve on a Unix socket until unloaded."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--socket", required=True, help="Unix socket path to serve on")
    parser.add_argument("--generation", type=int, default=1)
    parser.add_argument("--worker-id", default="alone")
    arguments = parser.parse_args()
    logs.configure()
    asyncio.run(serve(arguments.socket, arguments.generation, arguments.worker_id))


if __name__ == "__main__":
    main()
