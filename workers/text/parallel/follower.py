"""`python -m workers.text.parallel.follower`: one rank but the first of a split model.

Above: `followers.py`, which starts it and holds the other end of its socket. Below: `shard.py`. It computes what the
first rank computes, on its own part, and ends when that one closes the socket or dies: the socket tells, and the kernel
does, should it be stuck in a collective.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostler import logs
from hostler.errors import HostlerError

from workers.child import die_with, spec_of
from workers.text.parallel.wire import Channel, Kind, decode_step

if TYPE_CHECKING:
    from workers.text.eager import ModelRunner
    from workers.text.parallel.shard import Share

log = logging.getLogger(__name__)


def exit_when_alone(end: socket.socket) -> None:
    """End this process as soon as the other end of its socket is closed, whatever it does meanwhile."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def expect(channel: Channel, kind: Kind) -> bytes:
    """Return the body of the next frame, which must be of this kind.

    Raises:
        EOFError: the first rank has gone.
    """
    frame = channel.receive()
    if frame is None:
        raise EOFError
    assert frame[0] is kind, f"{frame[0].name} instead of {kind.name}"
    return frame[1]


def load(channel: Channel) -> Share:
    """Load what the first rank says, answering at each stage.

    Raises:
        HostlerError: it cannot be loaded.
        EOFError: the first rank has gone.
    """
    task = json.loads(expect(channel, Kind.TASK))
    spec = spec_of(task["spec"])
    # What follows takes seconds to import.
    import torch

    from workers.text.parallel.group import Membership, join
    from workers.text.parallel.shard import load_share, prepare

    directory, plan = prepare(spec)
    channel.send(Kind.PREPARED)
    expect(channel, Kind.LOAD)
    member = Membership(task["rank"], len(spec.devices), torch.device(spec.device))
    join(member, Path(task["meeting"]))
    share = load_share(spec, directory, plan, member, task["num_threads"], lambda *_: None)
    channel.tell(Kind.READY, weight_bytes=share.weight_bytes)
    return share


def follow(channel: Channel) -> None:
    """Load, then run every step that the first rank runs, until it has gone.

    Raises:
        Exception: whatever a step raises; the ranks are then out of step and none can go on.
    """
    try:
        runner = load(channel).runner
    except HostlerError as error:
        channel.tell(Kind.FAILED, message=error.message)
        raise
    while (frame := channel.receive()) is not None:
        kind, body = frame
        if kind is Kind.STEP:
            runner.run_packed(decode_step(body))
        else:
            assert kind is Kind.RESIZE, kind.name
            channel.tell(Kind.RESIZED, done=resized(runner, json.loads(body)))


def resized(runner: ModelRunner, wanted: dict[str, Any]) -> bool:
    """Resize this rank's cache; return False when there is no room."""
    try:
        runner.resize(wanted["num_blocks"], {int(old): int(new) for old, new in wanted["kept"]})
    except (MemoryError, RuntimeError):  # torch.OutOfMemoryError is a RuntimeError
        log.warning("no room to resize", exc_info=True)
        return False
    return True


def main() -> None:
    """Follow until the first rank has gone."""
    parser = argparse.ArgumentParser(prog="python -m workers.text.parallel.follower", description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="inherited file descriptor of a connected socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the first rank")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    logs.configure()
    end = socket.socket(fileno=arguments.socket)
    threading.Thread(target=exit_when_alone, args=(end,), daemon=True, name="alone").start()
    status = 1
    try:
        follow(Channel(end))
    except EOFError:
        status = 0
    except Exception:
        log.exception("part of a split model ended")
    finally:
        # The interpreter's own way out may wait for collectives that will never complete.
        logging.shutdown()
        os._exit(status)


if __name__ == "__main__":
    main()
