"""Who is measured, at which loads, and what the command line means."""

from __future__ import annotations

import pytest

from tests.bench.__main__ import levels_for, parse, prepared
from tests.bench.hostler_serve import Hostler
from tests.bench.lineup import choose, lineup
from tests.bench.peers import Skip, StoredModel, tensors_of


@pytest.fixture
def model(tmp_path):  # type: ignore[no-untyped-def]
    safetensors = pytest.importorskip("safetensors.numpy")
    numpy = pytest.importorskip("numpy")
    tensors = {"matrix": numpy.zeros((4, 10), numpy.float16), "norm": numpy.zeros((10,), numpy.float32)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return StoredModel("small", tmp_path)


def shorts(peers) -> list[str]:  # type: ignore[no-untyped-def]
    return [peer.short for peer in peers]


def test_every_contestant_has_a_name_of_its_own(model: StoredModel) -> None:
    names = shorts(lineup(model, 2))
    assert len(set(names)) == len(names)
    assert names[:2] == ["hostler", "hostler-int8"]


def test_peers_are_chosen_by_name_and_keep_the_lineups_order(model: StoredModel) -> None:
    assert shorts(choose(lineup(model, 2), "llama-q8, hostler")) == ["hostler", "llama-q8"]
    assert shorts(choose(lineup(model, 2), None)) == shorts(lineup(model, 2))


@pytest.mark.parametrize("names", ["hostler,vlm", ""])
def test_a_name_that_nobody_has_is_refused_with_those_there_are(model: StoredModel, names: str) -> None:
    with pytest.raises(ValueError, match="hostler-int8, vllm"):
        choose(lineup(model, 2), names)


def test_a_serial_server_is_not_asked_for_many_streams(model: StoredModel) -> None:
    (serial,) = choose(lineup(model, 2), "transformers")
    assert levels_for(serial, [1, 4, 16]) == [1]
    assert levels_for(Hostler(model), [1, 4, 16]) == [1, 4, 16]


class Unable(Hostler):
    def prepare(self, say) -> None:  # type: ignore[no-untyped-def]
        raise Skip("no compiler")


def test_who_cannot_run_here_leaves_a_notice_and_the_others_run(
    model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr("tests.bench.hostler_serve.first_start_s", lambda _peer: 4.0)
    notices: list[str] = []
    peers = [Unable(model, "int8"), Hostler(model), *choose(lineup(model, 2), "transformers")]
    assert shorts(prepared(peers, [16], notices, Console())) == ["hostler"]
    assert notices[0] == "hostler (int8) was skipped: no compiler"
    assert notices[1].startswith("transformers serve (default) was skipped: it serves at most 1 at a time")


def test_int8_asks_for_it_in_the_configuration_and_bf16_does_not(model: StoredModel) -> None:
    assert "  quantize: int8\n" not in Hostler(model).config
    assert Hostler(model, "int8").config == Hostler(model).config + "  quantize: int8\n"


def test_int8_reads_a_byte_a_weight_and_a_scale_a_row(model: StoredModel) -> None:
    (file,) = model.path.glob("*.safetensors")
    assert sorted(tensors_of(file)) == [((4, 10), 80), ((10,), 40)]
    assert model.int8_bytes == 4 * 10 + 4 * 4 + 40


def test_changed_weights_have_another_fingerprint(model: StoredModel) -> None:
    before = model.fingerprint
    assert model.fingerprint == before
    (file,) = model.path.glob("*.safetensors")
    file.write_bytes(file.read_bytes() + b" ")
    assert model.fingerprint != before


def test_quick_is_one_round_of_16_streams_unless_rounds_are_named() -> None:
    assert (parse(["--quick"]).streams, parse(["--quick"]).rounds) == ([16], 1)
    assert parse(["--quick", "--rounds", "3"]).rounds == 3
    assert (parse([]).streams, parse([]).rounds) == ([1, 4, 16], 2)
    assert parse(["--streams", "16,1"]).streams == [1, 16]


def test_only_and_peers_exclude_each_other(capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        parse(["--only", "hostler", "--peers", "vllm"])
    assert "not allowed with" in capsys.readouterr().err
