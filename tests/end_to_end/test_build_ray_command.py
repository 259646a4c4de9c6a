"""Packing on a Ray as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys

import fsspec
import pytest

from pipeline.tools.errors import UsageError
from tests.helpers.training_processes import REPOSITORY, end_processes, marked, processes


def command(*words: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.build_shards", *map(str, words)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_as_a_user_starts_it_onto_s3(image_folder, tiny_data, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    mark, environment = marked(
        PYTHONPATH=str(REPOSITORY),
        AWS_ENDPOINT_URL="http://{}:{}".format(*server.get_host_and_port()),
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_CONFIG_FILE=os.devnull,
    )
    flags = (
        "--train",
        image_folder / "train",
        "--val",
        image_folder / "val",
        "--samples-per-shard",
        10,
    )
    try:
        for name in environment:
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, environment[name])
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("packed")
        done = command("s3://packed/set", *flags, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == ""
        assert "data set s3://packed/set: 48 train, 20 val images" in done.stderr
        assert not {"Traceback", "WARNING", "INFO"} & set(done.stderr.split())
        expected = {path.name: path.read_bytes() for path in tiny_data.iterdir()}
        assert set(system.ls("packed/set", detail=False)) == {f"packed/set/{n}" for n in expected}
        for name, data in expected.items():
            assert system.cat_file(f"packed/set/{name}") == data
        assert processes(mark) == []
    finally:
        end_processes(mark)
        server.stop()


def test_a_wrong_command_is_refused_before_ray_starts(tmp_path, monkeypatch):
    from cluster.build_shards import main

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("cluster.launch.task_pool.ray_session", no_ray)
    flags = ["--train", str(tmp_path / "nowhere")]
    for words, message in (
        ([str(tmp_path / "out"), *flags], "nowhere"),
        ([str(tmp_path / "out"), *flags, "--workers", "-1"], "--workers -1 is out of range"),
        ([str(tmp_path / "out"), *flags, "--quality", "0"], "--quality 0 is out of range"),
        (["ftp://host/x", *flags], "written to folders and to object stores"),
    ):
        with pytest.raises(UsageError, match=message):
            main(words)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match="OUT out is relative"):
        main(["out", *flags])
