"""What a split model is decided by, without any process: rules, frames, environments, layers over devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.engine import LoadSpec
from workers.text.attention import PagedCache, StepContext
from workers.text.directory import read_directory
from workers.text.eager import ModelRunner
from workers.text.loader import load
from workers.text.native.runner import probe
from workers.text.packing import PackedStep
from workers.text.parallel.followers import environment, visible_devices
from workers.text.parallel.layers import place, spread
from workers.text.parallel.plan import Attention, CannotSplit, plan_split
from workers.text.parallel.runner import SplitRunner
from workers.text.parallel.wire import decode_step, encode_step
from workers.text.threads import Threads

RULES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def test_heads_that_divide_are_cut_as_transformers_says() -> None:
    plan = plan_split(RULES, num_heads=14, num_kv_heads=2, num_parts=2)
    assert (plan.attention, plan.num_kv_heads, plan.overrides) == (Attention.HEADS, 1, {})
    assert plan.kept_heads(1, 2) == slice(None)


def test_more_parts_than_key_heads_share_keys_and_each_keeps_the_head_its_queries_look_at() -> None:
    plan = plan_split(RULES, num_heads=8, num_kv_heads=2, num_parts=4)
    assert (plan.attention, plan.num_kv_heads) == (Attention.QUERIES, 1)
    assert set(plan.overrides) == {"layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"}
    # Query heads 0-3 look at key head 0, 4-7 at 1; each part has two of them.
    assert [plan.kept_heads(rank, 2) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]


def test_heads_that_do_not_divide_leave_attention_whole_and_cut_the_rest() -> None:
    plan = plan_split(RULES, num_heads=9, num_kv_heads=3, num_parts=2)
    assert (plan.attention, plan.num_kv_heads) == (Attention.WHOLE, 3)
    assert set(plan.overrides.values()) == {"replicate"}
    assert all("self_attn" in name for name in plan.overrides)


def test_attention_that_is_gathered_behind_its_projections_keeps_every_head() -> None:
    rules = {"layers.*.self_attn.qkv_proj": "colwise_gather_output", "layers.*.mlp.down_proj": "rowwise_split_input"}
    plan = plan_split(rules, num_heads=4, num_kv_heads=2, num_parts=2)
    assert (plan.attention, plan.num_kv_heads, plan.overrides) == (Attention.WHOLE, 2, {})


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (None, "no tensor-parallel plan"),
        ({"layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj"}, "does not project to keys"),
        ({name: rule for name, rule in RULES.items() if "self_attn" in name}, "do not divide by 2"),
    ],
)
def test_what_cannot_be_cut_says_why(rules: dict[str, str] | None, why: str) -> None:
    with pytest.raises(CannotSplit, match=why):
        plan_split(rules, num_heads=9, num_kv_heads=3, num_parts=2)


def test_a_step_arrives_as_it_was_sent() -> None:
    sent = PackedStep(
        tokens=np.asarray([5, 6, 7], np.int32),
        positions=np.asarray([40, 0, 1], np.int32),
        sequences=np.asarray([[0, 1, 40, 0], [1, 2, 0, 1]], np.int32),
        tables=np.asarray([[3, 1, 2], [4, 0, 0]], np.int32),
        logit_rows=np.asarray([0], np.int32),
        num_singles=1,
    )
    got = decode_step(encode_step(sent))
    for name in ("tokens", "positions", "sequences", "tables", "logit_rows"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
    assert got.num_singles == 1
    with pytest.raises(ValueError, match="says that it has"):
        decode_step(encode_step(sent)[:-4])


def test_a_follower_gets_no_secret_of_the_workers_environment() -> None:
    own = {
        "PATH": "/bin",
        "HOSTLER_LOG_LEVEL": "DEBUG",
        "HOSTLER_API_KEY": "k",
        "RAY_AUTH_TOKEN": "t",
        "HF_TOKEN": "h",
        "PYTHONSTARTUP": "/x",
    }
    env = environment(own, "3")
    assert (env["PATH"], env["HOSTLER_LOG_LEVEL"], env["CUDA_VISIBLE_DEVICES"]) == ("/bin", "DEBUG", "3")
    assert not {"HOSTLER_API_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN", "PYTHONSTARTUP"} & set(env)


def test_a_followers_gpu_is_named_as_the_workers_own_list_names_it() -> None:
    devices = ("cuda:0", "cuda:2")
    assert visible_devices(devices, {}) == ["0", "2"]
    assert visible_devices(devices, {"CUDA_VISIBLE_DEVICES": "4,5,GPU-77"}) == ["4", "GPU-77"]
    assert visible_devices(("cpu", "cpu"), {"CUDA_VISIBLE_DEVICES": ""}) == [None, None]


class Rank:
    """A rank's cache as the first rank sees it; it says no to more than `room` blocks."""

    pids: tuple[int, ...] = (1,)

    def __init__(self, room: int) -> None:
        self.room, self.num_blocks, self.lost_for = room, 10, ""

    def resize(self, num_blocks: int, kept: Mapping[int, int]) -> bool:
        if num_blocks <= self.room:
            self.num_blocks = num_blocks
        return num_blocks <= self.room

    def lost(self, reason: str) -> None:
        self.lost_for = reason


def test_a_cache_that_one_rank_has_no_room_for_stays_as_it_was_on_all() -> None:
    own, other = Rank(room=100), Rank(room=20)
    runner = SplitRunner(own, other, 10, lambda: None)  # type: ignore[arg-type]
    runner.resize(20, {})
    assert (own.num_blocks, other.num_blocks) == (20, 20)
    with pytest.raises(MemoryError):
        runner.resize(50, {})
    assert (own.num_blocks, other.num_blocks, other.lost_for) == (20, 20, "")


def test_layers_fill_devices_evenly_and_the_first_takes_fewer_for_what_else_it_holds() -> None:
    assert spread([10] * 8, 0, 2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert spread([10] * 8, 40, 2) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert spread([10] * 6, 0, 3) == [0, 0, 1, 1, 2, 2]


def test_every_module_of_a_model_has_a_device_and_only_layers_leave_the_first(tiny_model: Path) -> None:
    spec = LoadSpec(model="tiny", path=str(tiny_model), devices=("cpu", "cpu"), dtype="float32")
    names, of_layers = place(read_directory(spec), spec, 2)
    assert of_layers == [0, 1]
    assert {name for name, device in names.items() if device} == {"model.layers.1"}
    assert {"model.embed_tokens", "model.norm", "lm_head", "model.layers.0"} <= set(names)


def test_a_model_whose_layers_have_hooks_and_caches_of_their_own_computes_the_same(tiny_model: Path) -> None:
    from accelerate import dispatch_model

    spec = LoadSpec(model="tiny", path=str(tiny_model), devices=("cpu", "cpu"), dtype="float32")
    directory = read_directory(spec)
    plain = load(spec, lambda *_: None, directory)
    hooked: Any = load(spec, lambda *_: None, directory)
    names, _ = place(directory, spec, 2)
    dispatch_model(hooked.model, dict.fromkeys(names, torch.device("cpu")), force_hooks=True)

    def logits(model: Any) -> torch.Tensor:
        cache = PagedCache(directory.kv, torch.float32, torch.device("cpu"), layer_devices=[torch.device("cpu")] * 2)
        runner = ModelRunner(model, cache, Threads(1, 1))
        return torch.cat([runner.run_packed(step) for step in probe(1024)])

    torch.testing.assert_close(logits(hooked.model), logits(plain.model))


def test_a_steps_layout_is_copied_once_to_the_device_of_another_layer(tiny_model: Path) -> None:
    spec = LoadSpec(model="tiny", path=str(tiny_model), devices=("cpu", "cpu"), dtype="float32")
    here, elsewhere = torch.device("cpu"), torch.device("meta")
    cache = PagedCache(read_directory(spec).kv, torch.float32, here, layer_devices=[here, elsewhere])
    step = StepContext.of(probe(1024)[1], cache)
    there = step.on(elsewhere)
    assert {there.new_places.device.type, there.chunks[0].places.device.type} == {"meta"}
    assert there is step.on(elsewhere)
    assert step.on(here) is step
    assert cache.layer(1)[0].device.type == "meta"
