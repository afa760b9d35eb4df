"""The training demo: plain and fused curves lie on each other, a run that stops goes on as one that did not."""

import json

import pytest

from ivl_kernels import cli
from ivl_kernels.commands import train_demo

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


def numbers(folder):
    history = json.loads((folder / "train.json").read_text())
    return {name: [phase[kind]["loss"] for kind in ("plain", "fused")] for name, phase in history.items()}


def test_runs_and_resumes(tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main(["train-demo", "--out", str(whole), "--scale", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in train_demo.PHASES) and (whole / "train.png").stat().st_size > 20_000
    assert cli.main(["train-demo", "--out", str(halves), "--scale", "0.2", "--until", "MPO"]) == 0
    assert list(numbers(halves)) == ["next token", "MPO"]
    assert cli.main(["train-demo", "--out", str(halves), "--scale", "0.2", "--resume"]) == 0
    found, expected = numbers(halves), numbers(whole)
    assert list(found) == list(train_demo.PHASES)
    for name, curves in expected.items():
        for got, curve in zip(found[name], curves):
            assert got == pytest.approx(curve, rel=1e-4, abs=1e-5), name
    first, last = expected["next token"][1][0], expected["next token"][1][-1]
    assert last < first


def test_what_the_user_can_put_right(tmp_path, capsys):
    assert cli.main(["train-demo", "--out", str(tmp_path), "--resume"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert cli.main(["train-demo", "--out", str(tmp_path), "--scale", "0"]) == 2
    (tmp_path / "file").write_text("")
    assert cli.main(["train-demo", "--out", str(tmp_path / "file" / "x")]) == 2
    assert cli.main(["train-demo", "--out", str(tmp_path), "--image", "nowhere.jpg"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_curves_that_differ_are_a_failure(capsys):
    phase = {"loss": [1.0, 0.5], "seconds": [1.0, 1.0], "memory": [1, 1]}
    other = {**phase, "loss": [1.0, 0.52]}
    assert train_demo._report({"MPO": {"plain": phase, "fused": other}}) == ["MPO"]
    assert train_demo._report({"MPO": {"plain": phase, "fused": phase}}) == []
