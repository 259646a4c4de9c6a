"""Card of a data set: README.md with its figures, and croissant.json for programs.

README.md begins with the metadata that the Hugging Face hub reads. croissant.json is JSON-LD after
Croissant 1.1 (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html): every shard with
its SHA-256, the images and labels in them, and the names of the classes. No key says when it was
written: the same set gives the same card.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.manifest import CARD_MARK, CROISSANT, README
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.tar import escape
from pipeline.describe.facts import Facts, SplitFacts, describe_duplicates, describe_encoding
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.remote.target import FolderTarget, Target, open_store
from pipeline.sources.paths import base_name
from pipeline.tools.errors import UsageError
from pipeline.tools.files import ensure_writable, sha256
from pipeline.tools.text import hide_credentials, human_bytes

MOST_LISTED = 1000
"""Most classes in the table of README.md."""

_SIZES = ((3, "n<1K"), (4, "1K<n<10K"), (5, "10K<n<100K"), (6, "100K<n<1M"), (7, "1M<n<10M"),
          (8, "10M<n<100M"), (9, "100M<n<1B"), (10, "1B<n<10B"))  # fmt: skip
"""Powers of ten, and the hub's words for fewer images than that."""
_HUB_SPLITS = {"val": "validation"}
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract"),
            *("field", "fileProperty", "fileObject", "fileSet", "format", "includes", "isArray"),
            *("isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
            *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source"),
            *("subField", "transform"),
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
"""Context of Croissant 1.1, as its library writes it."""


def open_folder(data: str) -> Target:
    """Return the folder of a set, which a card can be written into.

    Raises:
        UsageError: it cannot be written, has a README.md of another hand, or is at an address that
            nothing is written to.
        StoreError: the store does not answer.
    """
    target: Target
    if is_remote(data):
        target = open_store(data, what="cards")
    else:
        target = FolderTarget(str(ensure_writable(local_path(data), "data set folder")))
    if target.size(README) is not None and CARD_MARK.encode() not in target.read(README):
        raise UsageError(
            f"{target.address}/{README} is there, and is no card that this command wrote; move it "
            "away, or do without --card"
        )
    return target


def write_card(target: Target, facts: Facts, name: str, manifest: Path) -> list[str]:
    """Write README.md and croissant.json into the folder of a set, each whole or not at all.

    Args:
        target: the folder.
        facts: of the set.
        name: title of the card.
        manifest: the set's manifest, or a copy of it.

    Returns:
        Paths or addresses of the two files.

    Raises:
        StoreError: the store does not answer.
    """
    files = {
        CROISSANT: render_croissant(facts, name, manifest),
        README: render_readme(facts, name),
    }
    for file_name, text in files.items():
        with target.create(file_name) as file:
            file.write(text.encode(errors="replace"))
    return [f"{target.address.rstrip('/')}/{file_name}" for file_name in (README, CROISSANT)]


def render_readme(facts: Facts, name: str) -> str:
    """Return README.md: metadata, then figures in Markdown."""
    manifest = facts.manifest
    lines = [
        "---",
        *_render_metadata(facts, name),
        "---",
        CARD_MARK,
        "",
        f"# {_to_markdown(name)}",
        "",
        f"{sum(one.split.samples for one in facts.splits):,} images"
        f"{f' of {len(manifest.classes):,} classes' if manifest.classes else ', no labels'}: "
        f"{describe_encoding(facts)}, in WebDataset shards.",
        "",
        "| split | images | shards | size | an image | images a class |",
        "|---|--:|--:|--:|--:|--:|",
        *map(_render_split, facts.splits),
        "",
        "| | R | G | B |",
        "|---|--:|--:|--:|",
        _render_row("mean", *(f"{one:.2f}" for one in facts.statistics.channel_mean)),
        _render_row(
            "standard deviation",
            *(f"{one:.2f}" for one in np.sqrt(np.diag(facts.statistics.covariance))),
        ),
        "",
        "Of the training images, values 0 to 255.",
        "",
        f"- near-duplicates: {describe_duplicates(facts)}",
        f"- rejected when packing: {manifest.rejected:,}",
        *(f"  - {one.count:,} times: {_to_markdown(one.reason)}" for one in facts.reasons or []),
        *(f"- {split} packed from: {_to_markdown(_shorten_source(source))}"
          for split, source in manifest.sources.items()),
        f"- seed of the order: {manifest.seed}",
        "",
        *_render_classes(facts),
        "## Use",
        "",
        "```python",
        "from pipeline import Stream",
        "",
        f"with Stream(DATA, split={facts.splits[0].name!r}, batch_size=128) as stream:",
        "    batch = next(stream)  # .images, .labels, .ids",
        "```",
        "",
        f"The shards are plain tars, which `webdataset` reads, too. `{MANIFEST}` names every file "
        "with its SHA-256 (`duet verify DATA` checks them); "
        f"`{CROISSANT}` says the same in [Croissant](https://mlcommons.org/croissant).",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _shorten_source(source: str) -> str:
    """Return an address; of a path only the name: folders of a machine tell readers nothing."""
    return hide_credentials(source) if is_remote(source) else base_name(source)


def _render_metadata(facts: Facts, name: str) -> Iterator[str]:
    """Yield the lines of YAML that the hub reads; every text is quoted as JSON, which YAML is."""
    images = sum(one.split.samples for one in facts.splits)
    yield f"pretty_name: {json.dumps(escape(name))}"
    if facts.manifest.classes:
        yield "task_categories: [image-classification]"
    yield f"size_categories: [{_find_size(images)}]"
    yield "tags: [webdataset, image, croissant]"
    yield "configs:"
    yield "- config_name: default"
    yield "  data_files:"
    for one in facts.splits:
        yield f"  - split: {_HUB_SPLITS.get(one.name, one.name)}"
        yield f"    path: {json.dumps(_find_pattern(one))}"


def _find_size(images: int) -> str:
    return next((words for power, words in _SIZES if images < 10**power), "n>1T")


def _find_pattern(facts: SplitFacts) -> str | list[str]:
    """Return a pattern that all shards of a split fit, and no others; else their names."""
    names = [shard.name for shard in facts.split.shards]
    own = f"{facts.name}-"
    return f"{own}*.tar" if all(name.startswith(own) for name in names) else names


def _render_split(one: SplitFacts) -> str:
    counts, sizes = one.per_class, one.image_bytes
    least, most = int(counts.min()), int(counts.max())
    return _render_row(
        one.name,
        f"{one.split.samples:,}",
        f"{len(one.split.shards):,}",
        human_bytes(one.split.bytes),
        human_bytes(sizes.mean) if len(sizes) else "–",
        f"{least:,}–{most:,}" if least < most else f"{most:,}",
    )


def _render_classes(facts: Facts) -> Iterator[str]:
    manifest = facts.manifest
    if not manifest.classes:
        return
    if len(manifest.classes) > MOST_LISTED:
        yield f"The {len(manifest.classes):,} classes are listed in `{MANIFEST}`."
        yield ""
        return
    yield "## Classes"
    yield ""
    titles = manifest.titles
    splits = [one.name for one in facts.splits]
    yield _render_row("label", "class", *(["name"] if titles else []), *splits)
    yield "|" + "|".join(["--:", "---", *(["---"] if titles else []), *["--:"] * len(splits)]) + "|"
    for label, class_name in enumerate(manifest.classes):
        names = [class_name, *([titles[label]] if titles else [])]
        counts = (f"{one.per_class[label]:,}" for one in facts.splits)
        yield _render_row(str(label), *names, *counts)
    yield ""


def _render_row(*cells: str) -> str:
    return f"| {' | '.join(map(_to_markdown, cells))} |"


def _to_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line, also in a table."""
    found = html.escape(escape(text), quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_[]|#" else sign for sign in found)


def render_croissant(facts: Facts, name: str, manifest_file: Path) -> str:
    """Return croissant.json."""
    manifest, records = facts.manifest, list[dict[str, Any]]()
    size = manifest_file.stat().st_size
    files = [_describe_file(MANIFEST, size, sha256(manifest_file), "application/json")]
    # Of shards that others made nobody knows the members; those of withdrawn images are there yet.
    is_plain = not manifest.foreign and manifest.withdrawn_sha256 is None
    ending = "npy" if manifest.encoding == "raw" else "jpg"
    has_labels = bool(manifest.classes)
    for one in facts.splits:
        shards = [
            _describe_file(
                shard.name,
                shard.bytes,
                manifest.purged.get(shard.name, shard.sha256),
                "application/x-tar",
            )
            for shard in one.split.shards
        ]
        files += shards
        if not is_plain:
            continue
        inside = [{"@id": shard["@id"]} for shard in shards]
        mime = "image/jpeg" if ending == "jpg" else "application/octet-stream"
        parts = [("images", ending, mime), *([("labels", "cls", "text/plain")] * has_labels)]
        for members, kind, format_ in parts:
            files.append(_describe_members(f"{one.name}-{members}-files", inside, kind, format_))
            records.append(_describe_records(one.name, members, kind))
    if has_labels:
        records.insert(0, _describe_classes(facts))
    table = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": escape(name),
        "description": f"{describe_encoding(facts)}, in WebDataset shards.",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "version": f"{manifest.number}.0.0",
        **({"url": hide_credentials(facts.data)} if is_remote(facts.data) else {}),
        "distribution": files,
        "recordSet": records,
    }
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _describe_file(name: str, size: int, digest: str, mime: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": mime,
        "sha256": digest,
    }


def _describe_members(
    name: str, inside: list[dict[str, str]], ending: str, mime: str
) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "containedIn": inside,
        "encodingFormat": mime,
        "includes": f"*.{ending}",
    }


def _describe_records(split: str, members: str, ending: str) -> dict[str, Any]:
    """Return the key and the image, or the label, of each sample of a split.

    They are two sets of records with the same keys: Croissant 1.1 has no join by a part of a name.
    """
    name = split if members == "images" else f"{split}-{members}"

    def field(what: str, kind: str, **source: Any) -> dict[str, Any]:
        return {
            "@type": "cr:Field",
            "@id": f"{name}/{what}",
            "name": what,
            "dataType": kind,
            "source": {"fileSet": {"@id": f"{split}-{members}-files"}, **source},
        }

    pattern = rf"^(.+)\.{ending}$"
    fields = [
        field("key", "sc:Text", extract={"fileProperty": "filename"}, transform={"regex": pattern})
    ]
    kinds = {"jpg": ("image", "sc:ImageObject"), "cls": ("label", "sc:Integer")}
    if ending in kinds:
        fields.append(field(*kinds[ending], extract={"fileProperty": "content"}))
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "key": {"@id": f"{name}/key"},
        "field": fields,
    }


def _describe_classes(facts: Facts) -> dict[str, Any]:
    manifest = facts.manifest
    kinds = {"label": "sc:Integer", "name": "sc:Text"}
    kinds |= {"title": "sc:Text"} if manifest.titles else {}
    rows = [
        {"classes/label": label, "classes/name": class_name}
        | ({"classes/title": manifest.titles[label]} if manifest.titles else {})
        for label, class_name in enumerate(manifest.classes)
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/label"},
        "field": [
            {"@type": "cr:Field", "@id": f"classes/{name}", "name": name, "dataType": kind}
            for name, kind in kinds.items()
        ],
        "data": rows,
    }
