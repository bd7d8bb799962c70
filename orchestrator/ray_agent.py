"""What Ray's node daemon gets in place of its two agents: a process that waits for the daemon's end, and no more.

Above it: the raylet, which insists on a dashboard agent and a runtime-environment agent, ends when one of them
ends, and does not finish its own start before both have told their ports. Ours are told by `ray_head.py`. Below it:
nothing. The real agents cost 0.9 s of CPU and 90 MB each at every start, and one opens an HTTP server; we use
neither metrics nor runtime environments.
"""

import os
import select

parent = os.pidfd_open(os.getppid())
poll = select.poll()
poll.register(parent, select.POLLIN)
poll.poll()
