"""`python -m gateway --run-dir DIR --fd N`: one gateway process. Above: `hostler serve`; below: `app`, `server`."""

from __future__ import annotations

import argparse
import gc
import socket
from pathlib import Path

from hostler.config import read_resolved
from hostler.logs import configure
from hostler.rundir import RunDir
from hostler.slices import ask_for_short_slices

from gateway.shared_numbers import share_numbers


def main() -> None:
    """Serve until SIGTERM, or until SIGUSR1 says that a successor does; the exit status is 0 after a clean stop."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description="One gateway process of a hostler server.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with config.json")
    parser.add_argument("--fd", type=int, required=True, help="inherited listening socket")
    parser.add_argument("--unix-fd", type=int, help="inherited listening Unix socket: the same application")
    parser.add_argument("--config", type=Path, help="another configuration than the run directory's")
    parser.add_argument("--ready-fd", type=int, help="inherited pipe that gets one byte once requests are accepted")
    parser.add_argument("--public-fd", type=int, help="inherited listening socket of the public application")
    arguments = parser.parse_args()
    configure()
    ask_for_short_slices(inherited=True)
    run_dir = RunDir(arguments.run_dir)
    config = read_resolved(arguments.config or run_dir.config)
    share_numbers(run_dir.metrics)
    # Only now: prometheus-client looks for that directory when it is imported.
    from gateway.app import create_app
    from gateway.server import build_server, serve

    app = create_app(
        config, placement_target=run_dir.orchestrator_target, token=run_dir.token(), state_dir=run_dir.path
    )
    server = build_server(
        app,
        drain_s=config.drain_s,
        reload_drain_s=config.reload_drain,
        lifetime=app.state.services.lifetime,
        ready_fd=arguments.ready_fd,
    )
    if arguments.public_fd is not None:
        from gateway.public_app import create_public_app

        listener = socket.socket(fileno=arguments.public_fd)
        server.add_public(create_public_app(app.state.services, told=run_dir.tunnel), listener)
    # What lives as long as the process need not be looked at by the cycle collector ever again.
    gc.collect()
    gc.freeze()
    descriptors = [arguments.fd] if arguments.unix_fd is None else [arguments.fd, arguments.unix_fd]
    serve(server, *(socket.socket(fileno=descriptor) for descriptor in descriptors))


if __name__ == "__main__":
    main()
