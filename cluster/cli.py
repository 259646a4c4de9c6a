"""The command `duet`: every command of the packages as a verb.

    duet VERB [arguments]        as python -m MODULE [arguments] does
    duet presets                 configs that come with Duet, and what each is for
    duet presets copy NAME [TO]  write one to edit

A verb's module is imported when the verb is called: the list of verbs is there at once.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.tools.errors import UsageError, run
from pipeline.tools.packages import DISTRIBUTION, find_version


class Verb(NamedTuple):
    """A verb: its module, which has `main(argv)`, and what it does, in one line."""

    module: str
    help: str


GROUPS: dict[str, dict[str, Verb]] = {
    "data": {
        "build-shards": Verb("pipeline.build_shards", "pack images into shards, and seal the set"),
        "index-shards": Verb("pipeline.index_shards", "use another tool's WebDataset shards"),
        "verify": Verb("pipeline.verify", "check a set, or what a run has read of it"),
        "describe": Verb("pipeline.describe.__main__", "what a set holds, as a table and a page"),
        "demo-images": Verb("pipeline.demo_images", "draw a small set to try everything on"),
        "throughput": Verb("pipeline.throughput.__main__", "how fast the stream is, and why"),
    },
    "training": {
        "train": Verb("cluster.train", "train a network, or resume a run"),
        "evaluate": Verb("cluster.evaluate", "error rates of a run, with one view or ten"),
        "export": Verb("cluster.export", "the merged weights as one file"),
        "presets": Verb("cluster.cli", "list the configs that come with Duet, or copy one"),
    },
    "looking": {
        "status": Verb("cluster.status", "the state of a run"),
        "report": Verb("cluster.report.page", "a run as one page"),
        "doctor": Verb("cluster.doctor.command", "check machine, data, and cluster"),
        "summary": Verb("model.summary", "layers, parameters, and operations of a network"),
    },
    "paper": {
        "study": Verb("cluster.experiments.study.__main__", "many runs, compared"),
        "evidence": Verb("cluster.experiments.evidence.__main__", "the paper's claims, judged"),
        "neighbors": Verb("cluster.experiments.neighbors.__main__", "images that look alike"),
        "codes": Verb("cluster.experiments.neighbors.codes", "short codes for neighbors"),
        "ensemble": Verb("cluster.experiments.ensemble", "error rates of several runs together"),
    },
}  # fmt: skip
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the verb that the first word names, with the words after it.

    Raises:
        UsageError: there is no such verb; names the nearest.
        DuetError: from the verb.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(format_help())
        return 0 if words else UsageError.exit_code
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"duet {find_version(DISTRIBUTION) or 'unknown'}\n")
        return 0
    name = find_verb(words[0])
    if name == "presets":
        return show_presets(words[1:])
    from pipeline.tools.arguments import set_command_name
    from pipeline.tools.startup import install_first_line

    set_command_name(f"duet {name}")
    install_first_line(name, words[1:])
    result: int | None = importlib.import_module(VERBS[name].module).main(words[1:])
    return result


def find_verb(word: str) -> str:
    """Return the verb that a word means; `build_shards` is `build-shards`.

    Raises:
        UsageError: none; names the nearest.
    """
    name = word.lower().replace("_", "-")
    if name in VERBS:
        return name
    near = difflib.get_close_matches(name, VERBS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "duet --help lists them"
    raise UsageError(f"duet has no verb {word!r}; {hint}")


def format_help() -> str:
    """Return the verbs, one line each."""
    lines = ["usage: duet VERB [arguments]        duet VERB --help says more", ""]
    for group, verbs in GROUPS.items():
        lines += [group, *(f"  {name:<14}{verb.help}" for name, verb in verbs.items()), ""]
    lines += ["duet --version", ""]
    return "\n".join(lines)


def show_presets(words: Sequence[str]) -> int:
    """List the presets with the first sentence of each, or copy one.

    Args:
        words: nothing, or `copy NAME [TO]`; TO is a file or folder, the current one by default.

    Raises:
        UsageError: other words, no such preset, or a file of that name is there.
    """
    from cluster.config import PRESETS, find_config

    if list(words[:1]) == ["copy"] and len(words) in (2, 3):
        source = find_config(Path(words[1]))
        target = Path(words[2] if len(words) == 3 else ".")
        target = target / source.name if target.is_dir() else target
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            raise UsageError(f"{target} is there already; name another file") from None
        sys.stderr.write(f"{target}: edit it, then duet train {target} --data DATA --run RUN\n")
        return 0
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write("usage: duet presets\n       duet presets copy NAME [TO]\n")
        return 0
    if words:
        raise UsageError(f"presets {' '.join(words)}; use duet presets, or presets copy NAME [TO]")
    paths = {str(one.relative_to(PRESETS).with_suffix("")): one for one in PRESETS.rglob("*.toml")}
    for name in sorted(paths, key=lambda name: (name.count("/"), name)):
        sys.stdout.write(f"{name:<28}{read_claim(paths[name])}\n")
    return 0


def read_claim(path: Path) -> str:
    """Return the first sentence of the comment that a preset begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not (text := line.lstrip("# ")):
            break
        lines.append(text)
    return re.split(r"(?<=[.?])\s", " ".join(lines), maxsplit=1)[0].rstrip(".")


def start() -> None:
    """Run `main` and end the process; the console command of the package."""
    run(main)


if __name__ == "__main__":
    start()
