"""The data set: there, whole as far as a look can tell, and how fast it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from cluster.config import Config
from cluster.doctor import speed
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import CACHE_SIZE, DataSet, default_cache, is_remote, open_dataset
from pipeline.stores.errors import without_secrets
from pipeline.tools.errors import DataError, DuetError

CREDENTIALS = {
    "s3": "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...   # or AWS_PROFILE; "
    "AWS_ENDPOINT_URL if it is not Amazon's; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "export GOOGLE_APPLICATION_CREDENTIALS=/path/key.json   # or gcloud auth "
    "application-default login",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"]}


class Data:
    """A data set under examination: `judge` yields findings, then `classes` is known."""

    def __init__(self, data: str, config: Config | None) -> None:
        self.data = data
        self.config = config
        self.classes: int | None = None
        """Number of them; None: the set cannot be read."""
        self._safe = without_secrets(data)

    def judge(self) -> Iterator[Finding]:
        """Yield what there is to say; every byte is for `pipeline.verify`."""
        cached = self.config.cached if self.config else {}
        try:
            if is_remote(self.data):
                speed.answers(self.data)  # sooner than a training, which is patient, would say it
            dataset = open_dataset(self.data, **cached)
        except Exception as error:  # a store's library raises what it pleases
            yield fail("data", speed.told(error), self._way_to_data(error))
            return
        with closing(dataset):
            try:
                manifest = self._check(dataset)
            except DuetError as error:
                yield fail("data", str(error), f"python -m pipeline.verify {self._safe}")
                return
            self.classes = len(manifest.classes)
            yield self._described(manifest)
            if split := self._missing_split(manifest):
                yield split
            if "train" not in manifest.splits:
                return
            if is_remote(self.data):
                yield from self._store(manifest)
            else:
                yield from self._disk(dataset, manifest)

    def _check(self, dataset: DataSet) -> Manifest:
        """Look at all that can be looked at without reading every byte.

        Raises:
            DataError: a file is missing, damaged or of another size.
        """
        from pipeline.dataset.image_stats import Statistics
        from pipeline.stream.shard_reader import Storage

        manifest = Manifest.load(dataset.folder)
        for split in manifest.splits:
            Storage(dataset, split).close()
        Statistics.load(dataset.folder, manifest.stats_sha256)
        if not is_remote(self.data):
            for shard in (shard for split in manifest.splits.values() for shard in split.shards):
                size = dataset.shard(shard).stat().st_size
                if size != shard.bytes:
                    raise DataError(
                        f"{dataset.folder / shard.name} has {size} bytes instead of {shard.bytes}"
                    )
        return manifest

    def _described(self, manifest: Manifest) -> Finding:
        counts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
        shards = sum(len(split.shards) for split in manifest.splits.values())
        sizes = "" if is_remote(self.data) else ", each of its size"
        return ok("data", f"{counts}; {len(manifest.classes)} classes; {shards} shards{sizes} "
                  "(pipeline.verify reads every byte)")  # fmt: skip

    def _missing_split(self, manifest: Manifest) -> Finding | None:
        if "train" not in manifest.splits:
            return fail("splits", f"no train; there are {', '.join(manifest.splits)}",
                        "python -m pipeline.build_shards OUT --train SRC")  # fmt: skip
        if self.config and self.config.validate_every and "val" not in manifest.splits:
            return fail("splits", "no val, and the config validates",
                        "--validate-every 0, or build the set with --val or --holdout")  # fmt: skip
        return None

    def _way_to_data(self, error: Exception) -> str:
        scheme = self.data.partition("://")[0]
        said = str(error)
        if not is_remote(self.data):
            return f"python -m pipeline.build_shards {self.data} --train SRC, or another --data"
        if "pip install" in said:
            return f"pip install 'duet[{'gs' if scheme == 'gcs' else scheme.removesuffix('a')}]'"
        if scheme in CREDENTIALS and ("redential" in said or "denied" in said or "40" in said):
            return CREDENTIALS[scheme]
        return "look at the address, and whether this machine reaches it (curl, aws s3 ls)"

    def _disk(self, dataset: DataSet, manifest: Manifest) -> Iterator[Finding]:
        split = manifest.splits["train"]
        verify = f"python -m pipeline.verify {self.data}"
        try:
            disk = speed.disk(dataset, "train", split, self.config)
            rate = speed.stream(self.data, self.config)
        except (DuetError, OSError) as error:
            yield fail("data speed", speed.told(error), verify)
            return
        told = (
            f"{disk.rate:,.0f} pictures/s from the disk ({disk.bytes / disk.seconds / 1e6:,.0f} "
            f"MB/s, {disk.order}), {self._batch(disk.rate)}"
        )
        if disk.cached > 0.1:
            told += f"; {disk.cached:.0%} of it stayed in the page cache, so the disk is slower"
        elif disk.bytes < speed.READ / 8:
            told += f"; only {disk.bytes / 1e6:.1f} MB were there to be read"
        if disk.rate < rate:
            yield warn(
                "data speed", f"{told}; it keeps the decoder waiting",
                "--shuffle block, or a copy on a local SSD (once in memory, the page cache serves)",
            )  # fmt: skip
        else:
            yield ok("data speed", told)
        threads = self.config.threads if self.config and self.config.threads else "all"
        yield ok("stream", f"{rate:,.0f} pictures/s decoded here on {threads} cores, "
                 f"{self._batch(rate)}")  # fmt: skip

    def _batch(self, rate: float) -> str:
        size = (self.config or Config()).batch_size
        return f"a batch of {size} in {size / rate * 1000:,.0f} ms"

    def _store(self, manifest: Manifest) -> Iterator[Finding]:
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        train = manifest.splits["train"]
        try:
            found = speed.store(self.data, shards)
        except Exception as error:
            said = speed.told(error)
            yield fail("store", f"{self._safe}: {said}", self._way_to_data(error))
            return
        if found.wrong:
            more = f" and {len(found.wrong) - 1} more" if len(found.wrong) > 1 else ""
            yield fail("store", f"{found.wrong[0]}{more}, of {found.looked_at} looked at",
                       f"copy the set there again   # {self._safe}")  # fmt: skip
            return
        rate = found.rate / (train.bytes / train.samples)
        told = (
            f"answers in {found.latency * 1000:,.0f} ms, {'less than ' * found.less}"
            f"{found.rate / 1e6:,.1f} MB/s with "
            f"{speed.PARALLEL} at a time = {rate:,.0f} pictures/s, {self._batch(rate)}; "
            f"{found.looked_at} of {len(shards)} shards looked at"
        )
        if found.less:
            mend = "a store nearer to this machine, or a copy of the set on a local disk"
            yield warn("store", told, mend)
        else:
            yield ok("store", told)
        yield self._cache(manifest)

    def _cache(self, manifest: Manifest) -> Finding:
        cached = (self.config or Config()).cached
        folder = Path(cached["cache"] or default_cache()).absolute()
        size = cached["cache_size"] if self.config else CACHE_SIZE
        free, whole = speed.free_below(folder), manifest.splits["train"].bytes
        told = f"{folder}: {free / GB:.1f} GB free, {size / GB:.1f} allowed, the set has "
        told += f"{whole / GB:.1f}"
        if free < min(size, whole):
            mend = f"--cache /a/larger/disk, or --cache-size {max(1, int(free * 0.9 / GB))}GB"
            return warn("cache", f"{told}: its disk fills up first", mend)
        full = (self.config or Config()).shuffle == "full"
        if full and size < whole:
            return warn("cache", f"{told}: every epoch fetches all anew, picture by picture",
                        "--shuffle block, or a larger --cache-size")  # fmt: skip
        return ok("cache", told)


def judge_data(data: str, config: Config | None) -> Iterator[Finding]:
    """Yield what there is to say of a data set."""
    return Data(data, config).judge()
