"""The placement simulator: the real policy over traces in virtual time, beside what others do and what could be done.

    hardware.py    what a load, a wake, a sleep takes; the page cache
    traces.py      what a trace is: devices, models, requests
    arrivals.py    how requests come: sessions, bursts, days, scans, agents
    catalog.py     the traces, each with why it is there
    world.py       the simulator: the scheduler's rules of waiting and turns, around any strategy
    strategies.py  who gives way: hostler's policy, LRU, LFU, the clairvoyant
    ollama.py      Ollama's scheduler, whose rules of waiting differ, too
    bound.py       what no one that serves in order of arrival can do with less of: a linear programme
    real.py        the same trace through the real scheduler, to see that the world here is like it
    figures.py     what is measured, and the goal
    deciding.py    how long a decision takes
    report.py      table, JSON, Markdown
    picture.py     the same as SVG

Above it: `make sim`, `tests/orchestrator/test_sim.py` (two traces). Below it: `orchestrator.policy`, `Reuse`,
`Experience`, `models.demand`.
"""
