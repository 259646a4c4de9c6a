"""Trainings that are refused before Ray starts."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from cluster.config import Config
from cluster.launch import session
from cluster.run.folder import lock_run, write_run_config
from cluster.train import main
from pipeline.dataset.manifest import identity
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.training_processes import SETTINGS, tiny_config  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{nowhere}"], "is not a folder; build it"),
        (["--run", "{config}"], "cannot be written"),
        (["--run", "/proc/run"], "cannot be written"),
        (["--width", "0.001"], "width is 0.001; the smallest"),
        (["--batch-size", "7"], "batch_size is 7; it must be a multiple of 2"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_starts(
    config, tiny_data, tmp_path, words, message
):
    names = {"nowhere": tmp_path / "nowhere", "config": config}
    words = [word.format(**names) for word in words]
    argv = [str(config), "--data", str(tiny_data), "--run", str(tmp_path / "run"), *words]
    with pytest.raises(UsageError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


def test_a_run_that_another_training_holds_is_refused(config, tiny_data, tmp_path):
    with lock_run(tmp_path), pytest.raises(UsageError, match="in use by another training"):
        main([str(config), "--data", str(tiny_data), "--run", str(tmp_path)])


def test_a_run_with_other_settings_or_data_is_refused(config, tiny_data, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    write_run_config(run, Config.from_settings(SETTINGS), identity(tiny_data), samples=48, step=0)
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    shutil.copytree(tiny_data, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UsageError) as caught:
        main([str(config), "--data", str(other), "--run", str(run), "--lr", "0.5", "--seed", "7"])
    message = str(caught.value)
    for words in ("at step 10", "lr: 0.01 -> 0.5", "seed: 0 -> 7", "data set (manifest): "):
        assert words in message


def test_a_ray_that_does_not_start_is_a_line(tmp_path, monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.\nMore of it")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SetupError) as caught:
        session._start(SimpleNamespace(init=init), tmp_path, 1, {})
    assert str(caught.value) == (
        "no Ray on this machine (The current node timed out during startup.); "
        "try again when less runs here"
    )


def test_a_token_that_others_can_read_is_kept_from_them(tmp_path, monkeypatch):
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    session.guard_token()  # there is none
    token.write_text("secret")
    token.chmod(0o644)
    session.guard_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"
