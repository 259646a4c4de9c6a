"""Addresses to build data sets at, and pools that build there."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.options import BuildConfig
from pipeline.remote.filesystem import RetryPolicy
from pipeline.remote.target import WORK, StoreTarget

CLAIM = f"{WORK}/claim"
QUICK = RetryPolicy(attempts=3, first_delay=0.01, stall=5)


@pytest.fixture(name="bucket")
def s3_address(s3_bucket: str) -> str:
    """Address in a bucket of `s3_server`, which the environment leads to."""
    return f"{s3_bucket}/sets/mine"


@pytest.fixture(name="memory")
def memory_address() -> str:
    return f"memory://{uuid.uuid4()}/set"


@pytest.fixture(name="target", params=["memory", "bucket"])
def target_at_address(request: pytest.FixtureRequest) -> StoreTarget:
    return StoreTarget(request.getfixturevalue(request.param), QUICK)


def put(target: StoreTarget, name: str, data: bytes) -> None:
    with target.create(name) as file:
        file.write(data)


def complaint(raised: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(raised.value)
    assert "\n" not in text
    return text


def fails(times: int, then: Callable, log: list) -> Callable:
    def call(*arguments, **options):
        log.append(arguments)
        if len(log) <= times:
            raise OSError("connection reset")
        return then(*arguments, **options)

    return call


class Here:
    """A pool without processes, that may be interrupted."""

    def __init__(self, results: int = 10**9) -> None:
        self.left = results

    def run(self, task: Callable, jobs: Iterable) -> Iterator:
        for job in jobs:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield task(job)


def options(out: str, image_folder: Path) -> BuildConfig:
    return BuildConfig(
        out=out,
        train=str(image_folder / "train"),
        val=str(image_folder / "val"),
        samples_per_shard=10,
        workers=1,
    )
