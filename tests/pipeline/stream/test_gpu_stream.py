"""A stream on a GPU: nothing waits for the device, no memory finds another user too early."""

from __future__ import annotations

import errno
import gc

import numpy as np
import pytest
import torch

from pipeline.batches import Batch, Stream
from pipeline.stream import operators
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import decode_crops
from pipeline.stream.ledger import writer
from pipeline.stream.ledger.proof import prove
from pipeline.stream.loader import BatchReader
from pipeline.stream.quarantine import HeaderCheck, TrialDecoder
from pipeline.throughput import hardware
from pipeline.throughput.clock import FEWEST
from pipeline.throughput.stages import Setting, measure_pixel_seconds, open_parts
from pipeline.tools.errors import SetupError
from tests.helpers.damage import taken, undecodable
from tests.helpers.fake_cuda import FakeEvent
from tests.helpers.fake_gpu_stream import FakeGpu, on_host, one_fake_gpu  # noqa: F401 - a fixture
from tests.helpers.host_reads import HostReads


def assert_same(found: Batch, host: Batch) -> None:
    """Compare a batch on the fake GPU with the same one of the CPU, up to float16."""
    assert found.images.is_cuda
    assert found.labels.is_cuda
    assert found.weights.is_cuda
    assert found.images.dtype == torch.float16
    assert torch.equal(found.ids, host.ids)
    assert torch.equal(found.replaced, host.replaced)
    for name in ("labels", "weights"):
        assert getattr(found, name).tolist() == getattr(host, name).tolist()
    pixels = on_host(found.images).float()
    torch.testing.assert_close(pixels, host.images, rtol=2e-3, atol=0.25)


RELEASED = {"mean": "image", "colour_divide": True}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("tiny_data", {}), ("tiny_data", RELEASED), ("tiny_data", {"prefetch": 1}),
        ("tiny_data", {"prefetch": 4}), ("raw_data", {}),
    ],
)  # fmt: skip
def test_nothing_in_next_waits_for_a_device_that_is_busy(
    kind, settings, request, tmp_path, fake_gpu: FakeGpu
):
    data = request.getfixturevalue(kind)
    options = {"batch_size": 16, "seed": 3, "threads": 1, **settings}
    with Stream(data, **options) as host:
        expected = taken(host, 9)
    with Stream(data, **options, device="gpu", ledger=tmp_path / "ledger") as stream:
        fake_gpu.waits.clear()  # the mean image crosses once, before the first batch
        found = []
        for _ in range(9):
            with HostReads() as reads:
                found.append(next(stream))
            assert reads.seen == {}
            fake_gpu.device.launch(1000)  # a step of the trainer
        assert fake_gpu.waits == []
        assert fake_gpu.device.waits == 0
        assert fake_gpu.device.now == 1  # of a clock that every wait moves
        addresses = [batch.images.data_ptr() for batch in found]
        assert fake_gpu.copies == [(at, fake_gpu.stream.cuda_stream, True) for at in addresses]
        assert len(set(addresses)) == 9
        stream.flush()
        assert fake_gpu.device.waits > 0
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    proof = prove(data, [tmp_path])
    assert (proof.findings, proof.position) == ((), 9 * 16)


def test_a_buffer_returns_to_the_reader_when_the_gpu_has_copied_it(
    raw_data, monkeypatch, fake_gpu: FakeGpu
):
    returned, recycle = [], BatchReader.recycle

    def note(reader, batch):
        returned.append(batch.position)
        recycle(reader, batch)

    monkeypatch.setattr(BatchReader, "recycle", note)
    with Stream(raw_data, batch_size=8, threads=1, device="gpu") as stream:
        for _ in range(8):
            fake_gpu.device.launch(1000)
            next(stream)
        assert returned == []
        assert fake_gpu.pinned >= 8
        fake_gpu.device.synchronize()
        next(stream)
        assert returned == [8, 16, 24, 32, 40, 48]  # the last three are kept as on a CPU
        made = fake_gpu.pinned
        for _ in range(30):
            fake_gpu.device.synchronize()
            next(stream)
        assert fake_gpu.pinned <= made + 1


@pytest.mark.parametrize("end", ["closed", "forgotten"])
def test_a_stream_ends_when_the_gpu_has_copied_what_came_out(raw_data, end, fake_gpu: FakeGpu):
    stream = Stream(raw_data, batch_size=8, threads=1, device="gpu")
    kept = next(stream).images
    before = on_host(kept).clone()
    fake_gpu.device.launch(1000)
    next(stream)
    assert fake_gpu.device.now == 1
    if end == "closed":
        stream.close()
    del stream
    gc.collect()
    assert fake_gpu.device.now > 1000
    assert torch.equal(on_host(kept), before)


def test_a_stream_closes_on_a_gpu_that_has_failed(tiny_data, monkeypatch, fake_gpu: FakeGpu):
    def fail(event: FakeEvent) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    stream = Stream(tiny_data, batch_size=8, threads=1, device="gpu")
    next(stream)
    monkeypatch.setattr(FakeEvent, "synchronize", fail)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_a_full_disk_is_told_once_though_more_batches_are_pending(
    tiny_data, tmp_path, monkeypatch, fake_gpu: FakeGpu
):
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Stream(tiny_data, batch_size=8, threads=1, device="gpu", ledger=tmp_path) as stream:
        for _ in range(4):
            fake_gpu.device.launch(1000)
            next(stream)
        fake_gpu.device.synchronize()
        with monkeypatch.context() as patch:
            patch.setattr(writer.os, "write", fail)
            with pytest.raises(SetupError, match="No space left"):
                next(stream)


def test_an_evaluation_ends_and_pads_as_on_a_cpu(tiny_data, fake_gpu: FakeGpu):
    options = {"split": "val", "crop": "center", "once": True, "batch_size": 9, "threads": 1}
    with (
        Stream(tiny_data, **options) as host,
        Stream(tiny_data, **options, device="gpu") as stream,
    ):
        for one, other in zip(stream, host, strict=True):
            assert_same(one, other)
        with pytest.raises(StopIteration):
            next(stream)


def test_images_that_fail_on_a_gpu_are_tried_on_the_cpu_and_replaced(
    data, monkeypatch, fake_gpu: FakeGpu
):
    monkeypatch.setattr(HeaderCheck, "find_undecodable", lambda self, ids, images: [])

    def cut(jpeg: bytearray) -> None:
        jpeg[len(jpeg) // 2 :] = bytes(len(jpeg) - len(jpeg) // 2)

    undecodable(data, 5, 30, edit=cut)
    with Stream(data, batch_size=24, seed=1) as host:
        expected = taken(host, 4)
    fake_gpu.trials = 0
    with Stream(data, batch_size=24, seed=1, device="gpu") as stream:
        for other in expected:
            assert_same(next(stream), other)
            fake_gpu.device.launch(1000)
        assert set(stream.damaged) == {5, 30}
    assert fake_gpu.trials >= 2


def test_a_trial_decoder_takes_no_gpu(fake_gpu: FakeGpu):
    trial = TrialDecoder()
    assert not trial.can_decode(np.zeros(100, np.uint8))
    assert (fake_gpu.trials, fake_gpu.copies) == (1, [])


def test_no_thread_of_a_decoder_is_tied_to_a_core(monkeypatch):
    calls = []
    monkeypatch.setattr(
        operators.fn.decoders, "image_crop", lambda *_, **given: calls.append(given)
    )
    for device in ("cpu", "gpu"):
        decode_crops(StreamConfig(device=device), None, 0.5, 0.5)
    assert [call["device"] for call in calls] == ["cpu", "mixed"]
    assert [call["affine"] for call in calls] == [False, False]


def test_seconds_of_a_batch_are_measured_without_waiting_for_the_next_ones(
    tiny_data, fake_gpu: FakeGpu
):
    setting = Setting(data=str(tiny_data), batch_size=8, threads=1, device="gpu")
    with open_parts(setting) as parts:
        assert len(measure_pixel_seconds(parts, parts.load_batches(2), 3)) == 3
    assert fake_gpu.stream.waits == 3 + 2 * setting.prefetch
    assert fake_gpu.waits == []


def test_a_host_that_only_launches_copies_waits_for_them_now_and_then(
    monkeypatch, fake_gpu: FakeGpu
):
    monkeypatch.setattr(hardware, "LARGE", 2**20)
    rate = hardware.measure_upload(0.01)
    assert rate.median > 0
    assert fake_gpu.stream.waits > FEWEST
    assert set(fake_gpu.waits) == {"synchronize"}  # around the windows


def busy(milliseconds: float) -> torch.cuda.Event:
    """Keep the current stream busy; returns an event at the end of it."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles
    done = torch.cuda.Event()
    done.record()
    return done


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tiny_data", "raw_data"])
def test_batches_that_wait_behind_long_kernels_keep_their_pixels(kind, request):
    """The stream is many batches ahead of the kernels that read its batches."""
    data = request.getfixturevalue(kind)
    options = {"batch_size": 16, "seed": 3, "device": "gpu"}
    with Stream(data, **options) as stream:
        expected = []
        for _ in range(12):
            batch = next(stream)
            torch.cuda.synchronize()
            expected.append((batch.images.cpu(), batch.labels.cpu()))
    with Stream(data, **options) as stream:
        next(stream)  # starts what starts once
    found, ahead = [], 0
    with Stream(data, **options) as stream:
        for _ in range(12):
            batch = next(stream)
            done = busy(30)
            found.append((batch.images.clone(), batch.labels.clone()))
            del batch
            ahead += not done.query()
    assert ahead > 0
    for (images, labels), (pixels, numbers) in zip(found, expected, strict=True):
        assert torch.equal(images.cpu(), pixels)
        assert torch.equal(labels.cpu(), numbers)


@pytest.mark.gpu
def test_next_returns_while_a_gpu_is_busy(raw_data):
    with Stream(raw_data, batch_size=16, device="gpu") as stream:
        for _ in range(8):
            next(stream)
        torch.cuda.synchronize()
        done = busy(500)
        for _ in range(2):
            next(stream)
        assert not done.query()
