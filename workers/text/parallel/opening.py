"""Opens a model over several devices: tensor parallel where its architecture can be cut, else layers over devices.

Above: `workers/text/opening.py`. Below: `shard.py` and `followers.py`, or `layers.py`.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hostler.errors import ModelLoadFailed

from workers.child import fields_of
from workers.ending import end_process
from workers.engine import LoadSpec
from workers.text.directory import Directory, LoadedModel
from workers.text.loader import Report
from workers.text.parallel import group
from workers.text.parallel.followers import Followers, environment, visible_devices
from workers.text.parallel.plan import Attention, CannotSplit, SplitPlan
from workers.text.parallel.runner import SplitRunner
from workers.text.parallel.shard import load_share, prepare
from workers.text.parallel.wire import Kind
from workers.text.runner import Runner

log = logging.getLogger(__name__)

OnLost = Callable[[str], None]


def check(spec: LoadSpec) -> None:
    """Refuse what no split model can do.

    Raises:
        ModelLoadFailed: says what.
    """
    kinds = {torch.device(name).type for name in spec.devices}
    if len(kinds) > 1:
        raise ModelLoadFailed(
            f"{spec.model} cannot be split over devices of different kinds ({', '.join(spec.devices)})."
        )
    if kinds != {"cpu"} and len(set(spec.devices)) < len(spec.devices):
        raise ModelLoadFailed(f"{spec.model} is to be split over the same device twice ({', '.join(spec.devices)}).")
    if spec.adapters:
        raise ModelLoadFailed(f"{spec.model} has adapters, which are not served over several devices.")


def open_split(spec: LoadSpec, report: Report, on_lost: OnLost = end_process) -> tuple[LoadedModel, Runner]:
    """Return the model and its runner over `spec.devices`, two or more. Blocking: seconds.

    Args:
        on_lost: called from any thread when a rank is lost while the model serves.

    Raises:
        ModelLoadFailed: it cannot be loaded, or not be split; says why.
    """
    check(spec)
    on_cpu = torch.device(spec.device).type == "cpu"
    try:
        directory, plan = prepare(spec)
        if plan.overrides and plan.attention is Attention.WHOLE and not on_cpu:
            # GPUs are for what is too large for one: even parts of layers, rather than a whole attention on each.
            raise CannotSplit("its heads do not divide")
    except CannotSplit as reason:
        if on_cpu:
            raise ModelLoadFailed(
                f"{spec.model} cannot be split over {len(spec.devices)} CPU devices: {reason}."
            ) from reason
        log.info("layers over devices", extra={"model": spec.model, "reason": str(reason)})
        from workers.text.parallel.layers import open_layers

        return open_layers(spec, report)
    return open_tensor_parallel(spec, directory, plan, report, on_lost)


def open_tensor_parallel(
    spec: LoadSpec, directory: Directory, plan: SplitPlan, report: Report, on_lost: OnLost
) -> tuple[LoadedModel, SplitRunner]:
    """Start the followers, load with them, and return the model and its runner.

    Raises:
        ModelLoadFailed: a rank could not load its part.
    """
    size = len(spec.devices)
    num_threads = max(1, (spec.num_threads or len(os.sched_getaffinity(0))) // size)
    private = Path(tempfile.mkdtemp(prefix="hostler-ranks-"))
    own = dict(os.environ)
    followers = Followers((environment(own, name) for name in visible_devices(spec.devices, own)[1:]), on_lost)

    def leave() -> None:
        group.leave()
        shutil.rmtree(private, ignore_errors=True)

    try:
        member = group.Membership(0, size, directory.device)
        # A follower sees one GPU only, and numbers it as the first.
        seen = "cpu" if directory.device.type == "cpu" else "cuda:0"
        its_spec = fields_of(replace(spec, devices=(seen,) * size))
        meeting = private / "meeting"
        shared = {"spec": its_spec, "meeting": str(meeting), "num_threads": num_threads}
        followers.tell(Kind.TASK, ({**shared, "rank": rank} for rank in range(1, size)))
        followers.expect(Kind.PREPARED)
        followers.tell(Kind.LOAD, ({} for _ in range(1, size)))
        try:
            group.join(member, meeting)
        except RuntimeError as error:
            raise ModelLoadFailed(f"The processes of {spec.model} did not find each other: {error}."[:300]) from error
        share = load_share(spec, directory, plan, member, num_threads, report)
        parts = [share.weight_bytes, *(int(part["weight_bytes"]) for part in followers.expect(Kind.READY))]
        if directory.device.type == "cpu":  # NCCL may meet there once more, at the first use of a group.
            shutil.rmtree(private, ignore_errors=True)
        followers.serve(group.COLLECTIVE_TIMEOUT_S)
    except BaseException:
        followers.close()
        leave()
        raise
    log.info(
        "model split", extra={"model": spec.model, "attention": plan.attention.value, "weight_bytes_of_parts": parts}
    )
    runner = SplitRunner(share.runner, followers, directory.kv.num_blocks, leave)
    return share.loaded.told(spec.quantize, sum(parts)), runner
