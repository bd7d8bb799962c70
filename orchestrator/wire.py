"""State into contract messages: routes, status, plans, progress. Pure.

Above it: the runtime and the service. Below it: the placement contract and the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import hostler
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator.cluster import Cluster
from orchestrator.state import Model, Progress, Stage, Worker, WorkerState
from orchestrator.views import Part, Plan, Refusal

_WORKER_STATES = {
    WorkerState.LOADING: pb.MODEL_STATE_LOADING,
    WorkerState.READY: pb.MODEL_STATE_READY,
    WorkerState.RESTING: pb.MODEL_STATE_DRAINING,
    WorkerState.ASLEEP: pb.MODEL_STATE_ASLEEP,
    WorkerState.WAKING: pb.MODEL_STATE_LOADING,
    WorkerState.DRAINING: pb.MODEL_STATE_DRAINING,
    WorkerState.LOST: pb.MODEL_STATE_FAILED,
}
_PROGRESS_STATES = {"download": pb.MODEL_STATE_FETCHING, "convert": pb.MODEL_STATE_FETCHING}
_PROGRESS_STATES |= {"verify": pb.MODEL_STATE_FETCHING, "queue": pb.MODEL_STATE_UNLOADED}


def model_state(cluster: Cluster, model: Model) -> pb.ModelState.ValueType:
    """Return the state that clients see of a model."""
    name = model.spec.name
    if cluster.ready(name):
        return pb.MODEL_STATE_READY
    if model.job is not None:
        return pb.MODEL_STATE_FETCHING if model.job.stage is Stage.FETCH else pb.MODEL_STATE_LOADING
    if model.failure:
        return pb.MODEL_STATE_FAILED
    if cluster.of(name, WorkerState.ASLEEP):
        return pb.MODEL_STATE_ASLEEP
    if cluster.of(name, WorkerState.DRAINING, WorkerState.RESTING):
        return pb.MODEL_STATE_DRAINING
    return pb.MODEL_STATE_UNLOADED


def replica(worker: Worker) -> pb.Replica:
    """Return a worker as gateways know it."""
    return pb.Replica(
        id=worker.id,
        address=worker.address,
        generation=worker.generation,
        state=_WORKER_STATES[worker.state],
        max_running=worker.max_running,
    )


def route(cluster: Cluster, model: Model) -> pb.ModelRoute:
    """Return one model's entry of the route table."""
    return pb.ModelRoute(
        name=model.spec.name,
        aliases=model.spec.aliases,
        state=model_state(cluster, model),
        replicas=[replica(worker) for worker in cluster.ready(model.spec.name)],
        engine=model.info.engine if model.info else model.spec.engine,  # type: ignore[arg-type]
        created_unix_s=model.spec.created_unix_s,
        owned_by=model.spec.owned_by,
        info=model.info,
        failure=model.failure,
        quantize=model.spec.quantize,
        adapters=[name for name, _ in model.spec.adapters],
    )


def routes(cluster: Cluster) -> list[pb.ModelRoute]:
    """Return the whole route table, configured models first, in their order."""
    return [route(cluster, model) for model in cluster.models.values() if not model.leaving]


def progress(value: Progress) -> pb.EnsureModelResponse:
    """Return a progress event."""
    return pb.EnsureModelResponse(
        progress=pb.EnsureProgress(
            state=_PROGRESS_STATES.get(value.stage, pb.MODEL_STATE_LOADING),
            stage=value.stage,
            done_bytes=value.done_bytes,
            total_bytes=value.total_bytes,
            detail=value.detail,
            num_ahead=value.num_ahead,
            eta_ms=round(value.eta_s * 1000),
        )
    )


def _parts(parts: tuple[Part, ...]) -> list[pb.DeviceBytes]:
    return [pb.DeviceBytes(device=part.device, num_bytes=part.num_bytes) for part in parts]


def plan(answer: Plan | Refusal, model: Model, cluster: Cluster) -> pb.PlanModelResponse:
    """Return what the policy said of a model; holders are named by their models."""
    quantize = model.spec.quantize
    if isinstance(answer, Refusal):
        return pb.PlanModelResponse(
            feasible=False,
            needed_bytes=answer.needed_bytes,
            lacking_bytes=answer.lacking_bytes,
            reason=answer.reason,
            advice=answer.advice,
            quantize=quantize,
        )
    models = {worker.id: worker.model for worker in cluster.workers.values()}
    return pb.PlanModelResponse(
        feasible=True,
        parts=_parts(answer.parts),
        needed_bytes=answer.needed_bytes,
        evict_models=[models[worker_id] for worker_id in answer.evict],
        sleep_models=[models[worker_id] for worker_id in answer.sleep],
        shrink_models=[models[worker_id] for worker_id, _ in answer.shrink],
        wakes=bool(answer.wake),
        kv_cache_bytes=answer.kv_cache_bytes,
        expected_ms=round(answer.expected_s * 1000),
        reason=answer.reason,
        quantize=quantize,
    )


def status(
    cluster: Cluster, started_unix_ms: int, num_blank: Mapping[str, int], event_counts: Sequence[pb.EventCount] = ()
) -> pb.GetStatusResponse:
    """Return devices, nodes, models and replicas as they are now. `num_blank`: blank workers by node."""
    devices = [
        pb.Device(
            id=d.id,
            kind=pb.DEVICE_KIND_CUDA if d.kind == "cuda" else pb.DEVICE_KIND_CPU,
            name=d.name,
            budget_bytes=d.budget_bytes,
            reserved_bytes=cluster.occupied_bytes(d.id),
            foreign_bytes=cluster.foreign_bytes.get(d.id, 0),
            node=d.node,
            total_bytes=d.total_bytes,
        )
        for d in cluster.devices.values()
    ]
    replicas = [
        pb.ReplicaStatus(
            model=w.model,
            replica=replica(w),
            parts=_parts(w.parts),
            reserved_bytes=w.reserved_bytes,
            loaded_unix_ms=w.loaded_unix_ms,
            last_used_unix_ms=w.used_unix_ms,
            pinned=cluster.models[w.model].pinned,
            reason=w.reason,
            worker=w.report or lifecycle_pb2.WatchResponse(generation=w.generation, pid=w.pid),
            completion_tokens_per_s=w.tokens_per_s,
            node=w.node,
        )
        for w in sorted(cluster.workers.values(), key=lambda w: w.generation)
    ]
    nodes = [
        pb.Node(
            id=node,
            sleep_budget_bytes=cluster.sleep_budget_bytes.get(node, 0),
            sleep_used_bytes=cluster.sleep_used_bytes(node),
            num_blank_workers=number,
        )
        for node, number in sorted(num_blank.items())
    ]
    return pb.GetStatusResponse(
        version=hostler.__version__,
        started_unix_ms=started_unix_ms,
        devices=devices,
        models=routes(cluster),
        replicas=replicas,
        nodes=nodes,
        event_counts=event_counts,
    )
