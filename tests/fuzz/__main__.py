"""`make fuzz`: a server with the scripted model, and schemathesis on it for five minutes."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.run import Bound, fuzz
from tests.journeys.server import SCRIPTED_CONFIG, Servers


def main() -> int:
    """Run, print what was found, and return schemathesis' exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="for the whole run")
    parser.add_argument("--seed", type=int, help="repeat a run that found something")
    parser.add_argument("--url", help="a server that runs already, instead of one of its own")
    parser.add_argument("--model", default="scripted", help="the model to ask it for")
    options = parser.parse_args()
    servers = Servers()
    try:
        url = options.url or servers(config=SCRIPTED_CONFIG).url
        status, output = fuzz(url, model=options.model, bound=Bound(seconds=options.seconds), seed=options.seed)
        print(output)
        for title, tail in servers.log_sections() if status else ():
            print(f"--- {title}\n{tail}")
        return status
    finally:
        servers.stop_all()


if __name__ == "__main__":
    sys.exit(main())
