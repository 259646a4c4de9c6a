"""Fixtures shared by all tests: drawn images and a tiny sealed data set of them."""

from __future__ import annotations

import gc
import multiprocessing.process
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import Phase, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.helpers.http_servers import Server
from tests.helpers.images import folder_per_class, packed
from tests.helpers.processes import fork_where_code_spawns

fork_where_code_spawns()

# A collection would visit all that is imported and collected, again and again.
gc.disable()

# What these helpers assert is to be told as fully as if a test had asserted it.
pytest.register_assert_rewrite(
    "tests.helpers.build_targets", "tests.helpers.ledgers", "tests.helpers.source_images"
)

# A shell starts its background jobs with SIGINT ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

STARTING_RAYS = (
    "test_ray_cluster.py", "test_ray.py", "test_ray_job.py", "test_build_ray.py",
    "test_build_ray_command.py", "test_ray_example.py", "test_hosts.py",
)  # fmt: skip

# Ray's workers give way to whoever wants the processor: here, to the tests beside them.
os.environ.setdefault("RAY_worker_niceness", "0")

# A machine that is busy at the first example, importing, is no failure.
settings.register_profile("duet", deadline=None)
# The same examples each time, and none sought that is shorter: a test of minutes looks like a hang.
PHASES = [phase for phase in Phase if phase is not Phase.shrink and phase is not Phase.explain]
settings.register_profile(
    "short", deadline=None, max_examples=25, derandomize=True, phases=PHASES
)  # fmt: skip
settings.load_profile("duet")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick` leaves out every test that starts a process (fixtures of the session may)."""
    parser.addoption("--quick", action="store_true", help="skip tests that start processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip the test at the first process that it starts, if `--quick` was given."""

    def refuse(*_: object, **__: object) -> None:
        pytest.skip("--quick: starts a process")

    if not item.config.getoption("--quick"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests with their reason; on a machine that must have a GPU, fail instead."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        reason = "needs a CUDA device, and torch sees none"
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(f"REQUIRE_GPU=1: {reason}")
        pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that start Rays first: together they take longest, and they often wait."""
    items.sort(key=lambda item: item.path.name not in STARTING_RAYS)


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but only what the tests make."""
    gc.freeze()
    gc.enable()


class OneRayAtATime(LoadFileScheduling):
    """Tests of a file run in one process of xdist, and those of all files that start Rays in one.

    A Ray is a dozen processes that each import torch: two of them at a time on two cores are slower
    than one after the other, and come near their timeouts.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ray" if Path(file).name in STARTING_RAYS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Have `OneRayAtATime` hand out the tests, whatever `--dist` says."""
    return OneRayAtATime(config, log)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/<class>/*.jpg (4 x 12) and val/<class>/*.jpg (4 x 5)."""
    root = tmp_path_factory.mktemp("pictures")
    folder_per_class(root / "train", 12)
    folder_per_class(root / "val", 5, first_seed=500)
    return root


@pytest.fixture(scope="session")
def tiny_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed data set of `pictures`: 48 train and 20 val samples in shards of 10."""
    out = tmp_path_factory.mktemp("tiny") / "data"
    packed(out, train=image_folder / "train", val=image_folder / "val", samples_per_shard=10)
    return out


@pytest.fixture(scope="session")
def raw_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_data`, but raw: the same images in the same places of the same shards."""
    out = tmp_path_factory.mktemp("raw") / "data"
    train, val = image_folder / "train", image_folder / "val"
    packed(out, train=train, val=val, samples_per_shard=10, encoding="raw")
    return out


@pytest.fixture(scope="session")
def second_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of other images of the same classes: the validation images of `tiny_data`."""
    out = tmp_path_factory.mktemp("second") / "data"
    packed(out, train=image_folder / "val", holdout=0.2, seed=5, samples_per_shard=4)
    return out


@pytest.fixture(scope="session")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 12 images more of the classes of `tiny_data`, in shards of 5: to append to it."""
    root = tmp_path_factory.mktemp("more")
    folder_per_class(root / "train", 3, first_seed=900)
    packed(root / "data", train=root / "train", samples_per_shard=5)
    return root / "data"


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_data` to do damage to."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def server(tiny_data: Path) -> Iterator[Server]:
    """A web server with `tiny_data`."""
    with Server(tiny_data) as running:
        yield running


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback."""
    moto = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket of `s3_server`, `s3://NAME`, which the environment leads to."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4()}"
    pytest.importorskip("boto3").client("s3").create_bucket(Bucket=name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://{name}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
