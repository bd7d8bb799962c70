"""Taking over a changed configuration without a restart: models that are new, changed or gone, and the policy's rules.

Above it: `scheduler.py`. Below it: `requests.py` (which models exist), `loading.py`, `retiring.py`. Nothing that runs
is cut off: a worker that was loaded otherwise than is configured now takes no new requests and goes when its running
ones have ended.
"""

from __future__ import annotations

import dataclasses
import logging

from hostler.errors import ModelNotFound
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events, models
from orchestrator.loading import Loading
from orchestrator.requests import Requests
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Model, WorkerState
from orchestrator.views import Rules

log = logging.getLogger(__name__)

_IN_SERVICE = (WorkerState.READY, WorkerState.RESTING, WorkerState.ASLEEP)


class Reconfiguring:
    """Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, requests: Requests, loading: Loading, retiring: Retiring) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._requests = requests
        self._loading = loading
        self._retiring = retiring

    def on_reconfigured(self, event: events.Reconfigured) -> None:
        """Take a configuration over. Devices and what belongs to a process's start are the old ones until then."""
        config = event.config
        self._runtime.config = config
        self._runtime.rules = Rules(min_residency_s=config.min_residency, max_wait_s=config.max_wait)
        self._cluster.apart = frozenset(config.apart)
        specs = {model.name: models.from_config(model) for model in config.models}
        # What is configured now may have been in the store under another name: that is the same model.
        taken = {name for spec in specs.values() for name in (spec.source, *spec.names)}
        for model in list(self._cluster.models.values()):
            name = model.spec.name
            if name in specs or model.leaving:
                continue
            if model.spec.configured or name in taken or model.spec.source in taken:
                self._remove(model)
        for spec in specs.values():
            self._take(spec)
        by_name = self._cluster.models
        self._cluster.models = {name: by_name[name] for name in specs} | by_name  # Routes keep the file's order.
        log.info("took a new configuration over", extra={"num_models": len(specs)})
        self.retire_outdated()
        self.forget()
        self._loading.place_waiting()
        self._runtime.publish()

    def retire_outdated(self) -> None:
        """Send away, gently, every worker that was loaded otherwise than its model is configured now."""
        for worker in list(self._cluster.workers.values()):
            model = self._cluster.models[worker.model]
            if model.leaving or not worker.recipe or worker.recipe == models.recipe(model.spec):
                continue
            drain_s = self._runtime.config.reload_drain
            self._retiring.gently(worker, drain_s, "its configuration has changed", pb.EVENT_KIND_UNLOADED)

    def forget(self) -> None:
        """Drop models that are configured no more and whose last worker has gone."""
        in_use = {worker.model for worker in self._cluster.workers.values()}
        gone = [name for name, model in self._cluster.models.items() if model.leaving and name not in in_use]
        for name in gone:
            del self._cluster.models[name]
        if gone:
            self._runtime.publish()
            self._requests.rescan()  # What is configured no more may be in the store, which is served, too.

    def _remove(self, model: Model) -> None:
        name, drain_s = model.spec.name, self._runtime.config.reload_drain
        log.info("a model is configured no more", extra={"model": name})
        model.leaving, model.wanted, model.pinned = True, False, False
        waiters, model.waiters = model.waiters, []
        for waiter in waiters:
            waiter.fail(
                ModelNotFound(f"The model {name!r} has just been taken out of the configuration.", param="model")
            )
        self._loading.drop(model)
        model.spec = dataclasses.replace(model.spec, configured=False, preload=False, aliases=(), adapters=())
        for worker in self._cluster.of(name, *_IN_SERVICE):
            self._retiring.gently(worker, drain_s, "it is configured no more", pb.EVENT_KIND_UNLOADED)

    def _take(self, spec: models.ModelSpec) -> None:
        model = self._cluster.models.get(spec.name)
        if model is None:
            self._requests.add(spec)
            self._bring_up(self._cluster.models[spec.name])
            return
        was, model.spec = model.spec, dataclasses.replace(spec, created_unix_s=model.spec.created_unix_s)
        had_left, model.leaving = model.leaving, False
        if model.spec == was:
            return
        if spec.pinned != was.pinned:  # Else an operator's pin stays.
            model.pinned = spec.pinned
        if spec.keep_alive_s != was.keep_alive_s:
            model.keep_alive_s = None
        if spec.preload and not was.preload:
            model.wanted = True
        model.failure, model.num_failures, model.retry_at_s = "", 0, 0.0
        if had_left or models.recipe(spec) != models.recipe(was):
            model.info = None
            self._loading.drop(model)  # Its load was of what is configured no more; who waits goes on waiting.
        self.retire_outdated()
        self._bring_up(model)

    def _bring_up(self, model: Model) -> None:
        """Load what is wanted, unless it is not known yet who lives: then that decides."""
        wanted = model.wanted or model.waiters
        if wanted and self._runtime.may_publish and not self._cluster.ready(model.spec.name):
            self._loading.start(model)
