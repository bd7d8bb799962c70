"""The proof of the scheduler: the real one, with its real parts, in a world that fails in every way we could think of.

    loop.py        asyncio in virtual time: no threads, no sleeping, the same run for the same seed
    process.py     one worker process as it really is
    world.py       devices, processes, requests, what an orchestrator leaves behind
    fates.py       how each effect ends: at once, late, never, with an error, after its caller has gone
    effects.py     the scheduler's system calls, carried out on the world
    shapes.py      small clusters that have every kind of model
    truth.py       what the scheduler says against what is: the model of truth
    invariants.py  what must hold after every event and after every step, one function each
    walk.py        everything that can happen, as steps drawn from seeds
    shrink.py      a failing run made short
    bugs.py        planted bugs: a proof that does not find them proves nothing

Above it: `test_proof.py` and `test_bugs.py` (small), `__main__.py` (`make prove`, a million steps).
"""
