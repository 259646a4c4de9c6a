from __future__ import annotations

import inspect
import io
import json
import pickle
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.remote.local import LocalDataset
from pipeline.stream.augment import compute_color_shift, draw
from pipeline.stream.config import StreamConfig
from pipeline.stream.order import FullShuffle
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.images import rows_of

SAMPLES = 48


def stored_bytes(data: Path, sample: int) -> np.ndarray:
    (view,), damaged = ShardReader(LocalDataset(data), "train").read(
        np.array([sample]), np.empty(100_000, np.uint8)
    )
    assert not damaged
    return view


def stored(data: Path, sample: int) -> np.ndarray:
    """A stored image by Pillow: float64 [256, 256, 3]."""
    jpeg = stored_bytes(data, sample)
    return np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")).astype(np.float64)


def taken(stream: Stream, batches: int) -> list:
    return [next(stream) for _ in range(batches)]


def joined(batches: list, field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


@pytest.mark.parametrize("colour", [0.0, 0.1])
def test_pixels_are_pillows_cropped_flipped_and_tinted(tiny_data, colour):
    stats = Statistics.load(tiny_data)
    with Stream(tiny_data, batch_size=60, seed=5, colour=colour) as stream:
        batch = next(stream)
    slots = FullShuffle([SAMPLES], 5).list_slots(0, 60)
    draws = draw(5, *slots[:2])
    deviations = stats.eigenvectors * np.sqrt(stats.eigenvalues)
    shift = compute_color_shift(colour * draws.color, deviations)
    assert batch.ids.tolist() == slots.ids.tolist()
    assert draws.flip.any()
    assert not draws.flip.all()
    for place, sample in enumerate(slots.ids):
        y, x = draws.y[place], draws.x[place]
        expected = stored(tiny_data, sample)[y : y + 224, x : x + 224]
        if draws.flip[place]:
            expected = expected[:, ::-1]
        expected = expected - stats.channel_mean + shift[place]
        got = batch.images[place].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(got, expected, atol=1e-3)


def test_labels_are_those_packed_with_the_images(tiny_data):
    labels = rows_of(tiny_data, "train")["label"]
    with Stream(tiny_data, batch_size=50) as stream:
        batch = next(stream)
    assert batch.labels.tolist() == labels[batch.ids.numpy()].tolist()
    assert (batch.weights == 1).all()


def test_batches_do_not_depend_on_world_threads_or_prefetch(tiny_data):
    with Stream(tiny_data, batch_size=24, seed=1, threads=1) as stream:
        whole = taken(stream, 5)
    assert len(set(joined(whole, "ids")[:SAMPLES].tolist())) == SAMPLES
    for world in (2, 3, 5):
        parts = []
        for rank in range(world):
            options = {"threads": 2, "prefetch": rank + 1, "rank": rank, "world_size": world}
            with Stream(tiny_data, batch_size=24, seed=1, **options) as stream:
                parts.append(taken(stream, 5))
        for step, batch in enumerate(whole):
            pieces = [part[step] for part in parts]
            assert torch.equal(joined(pieces, "ids"), batch.ids)
            assert torch.equal(joined(pieces, "labels"), batch.labels)
            assert torch.equal(joined(pieces, "images"), batch.images)
            assert {piece.position for piece in pieces} == {batch.position}


def test_a_restart_at_a_position_goes_on_exactly(tiny_data):
    with Stream(tiny_data, batch_size=20, seed=2) as stream:
        whole = taken(stream, 6)  # crosses two epoch borders
    for cut in (1, 2, 4):
        with Stream(tiny_data, batch_size=20, seed=2, position=whole[cut - 1].position) as stream:
            rest = taken(stream, 6 - cut)
        assert torch.equal(joined(rest, "ids"), joined(whole[cut:], "ids"))
        assert torch.equal(joined(rest, "images"), joined(whole[cut:], "images"))
    # ... also with another batch size: the samples are the same, cut differently.
    with Stream(tiny_data, batch_size=30, seed=2) as stream:
        assert torch.equal(joined(taken(stream, 4), "images"), joined(whole, "images"))


def test_earlier_batches_keep_their_pixels(tiny_data):
    with Stream(tiny_data, batch_size=16) as stream:
        first = next(stream).images
        copy = first.clone()
        taken(stream, 12)
    assert torch.equal(first, copy)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_each_sample_once(tiny_data, world):
    seen: list[int] = []
    lengths = set()
    for rank in range(world):
        options = {
            "split": "val",
            "crop": "center",
            "once": True,
            "rank": rank,
            "world_size": world,
        }
        with Stream(tiny_data, batch_size=9, **options) as stream:
            batches = list(stream)
        lengths.add(len(batches))
        assert batches[-1].position == 20
        for batch in batches:
            seen += batch.ids[batch.weights == 1].tolist()
    assert sorted(seen) == list(range(20))
    assert lengths == {3}


def read_ids(batches) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def test_an_iterable_has_equal_epochs_and_loses_no_batch(tiny_data):
    options = {"batch_size": 10, "seed": 3, "threads": 1}
    with Stream(tiny_data, **options) as stream:
        uncut = read_ids(taken(stream, 15))
    with Stream(tiny_data, **options) as stream:
        loader = DataLoader(stream.as_iterable(), batch_size=None)
        assert len(loader) == 5
        epochs = [read_ids(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]
    assert list(chain(*epochs)) == uncut
    flat = list(chain(*uncut))
    assert all(sorted(flat[p : p + SAMPLES]) == list(range(SAMPLES)) for p in (0, 48, 96))
    with Stream(tiny_data, **options) as stream:
        iterable = stream.as_iterable()
        assert read_ids(islice(iterable, 2)) == uncut[:2]
        assert read_ids(iterable) == uncut[2:7]


@pytest.mark.parametrize("taken_before", [3, 5, 7])
def test_an_iterable_resumes_within_its_epoch_in_any_world(tiny_data, taken_before):
    options = {"seed": 3, "threads": 1}
    with Stream(tiny_data, batch_size=10, **options) as stream:
        iterable = stream.as_iterable()
        batches = (batch for _ in range(3) for batch in iterable)
        for _ in range(taken_before):
            next(batches)
        states = [json.loads(json.dumps(one.state_dict())) for one in (iterable, stream)]
        rest = joined(list(batches), "images")
    for state in states:  # that of the stream has no start of the epoch: it follows from 0 on
        halves = []
        for rank in range(2):
            with Stream(tiny_data, batch_size=10, rank=rank, world_size=2, **options) as stream:
                iterable = stream.as_iterable()
                next(iter(iterable))
                iterable.load_state_dict(state)
                epochs = [list(iterable) for _ in range(3 - taken_before // 5)]
            assert [len(epoch) for epoch in epochs] == [5 - taken_before % 5, 5, 5][: len(epochs)]
            halves.append(chain(*epochs))
        again = [half.images for pair in zip(*halves, strict=True) for half in pair]
        assert torch.equal(torch.cat(again), rest)


def test_an_iterable_over_one_pass_starts_again_each_time(tiny_data):
    with Stream(tiny_data, split="val", batch_size=8, once=True, crop="center") as stream:
        iterable = stream.as_iterable()
        next(iter(iterable))  # as Lightning's sanity check leaves it
        for _ in range(2):
            batches = list(iterable)
            assert len(batches) == len(iterable) == 3
            counted = joined(batches, "weights") == 1
            assert joined(batches, "ids")[counted].tolist() == list(range(20))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_an_iterable_is_refused_in_another_process(tiny_data):
    message = "cannot be used in another process .* give DataLoader num_workers=0"
    with Stream(tiny_data, batch_size=8) as stream:
        iterable = stream.as_iterable()
        with pytest.raises(UsageError, match=message) as caught:
            pickle.dumps(iterable)  # as a spawned worker gets it
        assert "\n" not in str(caught.value)
        forks = DataLoader(iterable, batch_size=None, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(UsageError, match=message):
            next(iter(forks))
        assert next(iter(iterable)).ids.shape == (8,)


def test_a_batch_moves_to_a_device_as_frameworks_ask(tiny_data):
    with Stream(tiny_data, batch_size=8) as stream:
        batch = next(stream)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {moved.images.device.type, moved.labels.device.type, moved.weights.device.type} == {
        "meta"
    }
    assert moved.images.shape == batch.images.shape
    assert torch.equal(moved.ids, batch.ids)
    assert moved.position == batch.position == 8


def test_centre_and_whole_views(tiny_data):
    mean = Statistics.load(tiny_data).channel_mean
    with (
        Stream(tiny_data, batch_size=8, crop="whole", once=True) as whole,
        Stream(tiny_data, batch_size=8, crop="center", once=True) as centre,
    ):
        a, b = next(whole), next(centre)
    assert a.images.shape == (8, 3, 256, 256)
    assert torch.equal(a.images[:, :, 16:240, 16:240], b.images)
    for place in range(8):
        got = a.images[place].numpy().transpose(1, 2, 0) + mean
        np.testing.assert_allclose(got, stored(tiny_data, place), atol=1e-3)


def test_every_setting_is_a_keyword_with_its_default_and_no_other_is_taken(tiny_data):
    data, *settings = inspect.signature(Stream).parameters.values()
    assert data.name == "data"
    assert settings == list(inspect.signature(StreamConfig).parameters.values())
    with pytest.raises(TypeError, match="btach_size"):
        Stream(tiny_data, btach_size=8)
    with pytest.raises(TypeError, match="positional"):
        Stream(tiny_data, "train")
    settings = {"batch_size": 5, "seed": 2, "threads": 1}
    with (
        Stream(tiny_data, **settings) as stream,
        Stream.from_config(tiny_data, StreamConfig(**settings)) as other,
    ):
        assert torch.equal(next(stream).images, next(other).images)


def test_wrong_use_is_refused(tiny_data, tmp_path):
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Stream(tmp_path)
    with pytest.raises(UsageError, match="no split 'test'; it has train, val"):
        Stream(tiny_data, split="test")
    with pytest.raises(ValueError, match="batch_size is 1; it must be from 2 to 1048576"):
        Stream(tiny_data, batch_size=1, world_size=2)
    with pytest.raises(ValueError, match="rank 2"):
        Stream(tiny_data, batch_size=8, rank=2, world_size=2)
    for wrong in (
        {"crop": "centre"}, {"shuffle": "blok"}, {"device": "cuda:x"}, {"colour": float("nan")},
        {"hw_decoder_load": 2.0}, {"threads": -1}, {"window": 0}, {"seed": 2**64},
        {"batch_size": 10**14}, {"prefetch": 10**9}, {"position": 2**63}, {"window": 10**20},
        {"colour": 10**400}, {"colour": 1e300}, {"colour": ((0, 0.1), (10**20, 0.0))},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Stream(tiny_data, **wrong)
    stream = Stream(tiny_data)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match="torch sees none"):
            Stream(tiny_data, device="gpu")


@pytest.mark.gpu
def test_gpu_pixels_are_the_cpu_graphs(tiny_data):
    with (
        Stream(tiny_data, batch_size=SAMPLES, seed=3) as host,
        Stream(tiny_data, batch_size=SAMPLES, seed=3, device="gpu") as device,
    ):
        a, b = next(host), next(device)
    assert b.images.is_cuda
    assert b.images.dtype == torch.float16
    assert torch.equal(a.ids, b.ids)
    difference = (a.images - b.images.float().cpu()).abs()
    assert difference.mean() < 0.5  # grey levels: another IDCT, float16
    assert difference.quantile(0.999) < 8
