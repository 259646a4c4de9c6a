"""The command `duet`: every command of the packages as a verb.

    duet VERB [arguments]        as python -m MODULE [arguments] does
    duet presets                 configs that come with Duet, and what each is for
    duet presets copy NAME [TO]  write one to edit
    duet --print-completion bash the script that completes verbs, flags and presets; zsh, fish, tcsh

A verb's module is imported when the verb is called: the list of verbs is there at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.tools.errors import UsageError, run

if TYPE_CHECKING:
    from pipeline.tools.arguments import Options


class Verb(NamedTuple):
    """A verb: the function that runs it, its flags, and what it does, in one line."""

    module: str
    """Module with `main(argv)`, or module and name of another function of the words after it."""
    options: str
    """Module and name of the dataclass of its flags; "": it has none."""
    help: str


GROUPS: dict[str, dict[str, Verb]] = {
    "data": {
        "build-shards": Verb("pipeline.build_shards", "pipeline.options:BuildConfig",
                             "pack images into shards, and seal the set"),
        "index-shards": Verb("pipeline.index_shards", "pipeline.options:IndexConfig",
                             "use another tool's WebDataset shards"),
        "withdraw": Verb("pipeline.withdraw", "pipeline.options:WithdrawOptions",
                         "take samples out of a set, as a new version"),
        "verify": Verb("pipeline.verify", "pipeline.options:Verify",
                       "check a set, or what a run has read of it"),
        "describe": Verb("pipeline.describe.__main__", "pipeline.options:DescribeOptions",
                         "what a set holds, as a table and a page"),
        "demo-images": Verb("pipeline.demo_images", "pipeline.options:DemoOptions",
                            "draw a small set to try everything on"),
        "throughput": Verb("pipeline.throughput.__main__", "pipeline.options:ThroughputOptions",
                           "how fast the stream is, and why"),
    },
    "training": {
        "train": Verb("cluster.train", "cluster.cli.options:TrainOptions",
                      "train a network, or resume a run"),
        "evaluate": Verb("cluster.evaluate", "cluster.cli.options:EvaluateOptions",
                         "error rates of a run, with one view or ten"),
        "export": Verb("cluster.export", "cluster.cli.options:ExportOptions",
                       "the merged weights as one file"),
        "import-weights": Verb("cluster.import_weights", "cluster.cli.options:ImportOptions",
                               "a run of weights that Caffe or PyTorch trained"),
        "presets": Verb("cluster.cli.__main__:show_presets", "",
                        "list the configs that come with Duet, or copy one"),
    },
    "looking": {
        "status": Verb("cluster.status", "cluster.cli.options:StatusOptions",
                       "the state of a run"),
        "report": Verb("cluster.report.page", "cluster.cli.options:ReportOptions",
                       "a run as one page"),
        "doctor": Verb("cluster.doctor.command", "cluster.cli.options:DoctorOptions",
                       "check machine, data, and cluster"),
        "summary": Verb("cluster.cli.__main__:show_network", "cluster.cli.options:NetworkOptions",
                        "layers, parameters, and operations of a network"),
    },
    "paper": {
        "study": Verb("cluster.experiments.study.__main__", "cluster.cli.options:StudyOptions",
                      "many runs, compared"),
        "evidence": Verb("cluster.experiments.evidence.__main__",
                         "cluster.cli.options:EvidenceOptions", "the paper's claims, judged"),
        "neighbors": Verb("cluster.experiments.neighbors.__main__",
                          "cluster.cli.options:NeighborsOptions", "images that look alike"),
        "codes": Verb("cluster.experiments.neighbors.codes", "cluster.cli.options:CodesOptions",
                      "short codes for neighbors"),
        "ensemble": Verb("cluster.experiments.ensemble", "cluster.cli.options:EnsembleOptions",
                         "error rates of several runs together"),
    },
}  # fmt: skip
SHELLS = ("bash", "zsh", "fish", "tcsh")
"""Shells for which there is a script of completions."""
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
        from pipeline.tools.packages import DISTRIBUTION, find_version

        sys.stdout.write(f"duet {find_version(DISTRIBUTION) or 'unknown'}\n")
        return 0
    if words[0].startswith("--print-completion"):
        shell = "".join(words).removeprefix("--print-completion").removeprefix("=")
        sys.stdout.write(format_completion(shell))
        return 0
    return run_verb(find_verb(words[0]), words[1:])


def run_verb(name: str, words: Sequence[str]) -> int | None:
    """Run a verb with the words after it; nothing slow is imported for --help or a wrong flag.

    Raises:
        DuetError: from the verb, or a flag is unknown or empty.
    """
    from pipeline.tools.arguments import check_flags, format_options, use_command_name
    from pipeline.tools.startup import install_first_line, remove_first_line

    command, verb = f"duet {name}", VERBS[name]
    kind = load_options(verb) if verb.options else None
    if kind is not None and {"-h", "--help"} & set(words):
        sys.stdout.write(format_options(kind, command))
        return 0
    with use_command_name(command):
        if kind is not None:
            check_flags(kind, words, command)
            require_named_run(kind, words, command)
        install_first_line(name, words)
        try:
            module, _, function = verb.module.partition(":")
            run_it = getattr(importlib.import_module(module), function or "main")
            result: int | None = run_it(list(words))
            return result
        finally:
            remove_first_line()


def require_named_run(kind: type[Options], words: Sequence[str], command: str) -> None:
    """Refuse a RUN that holds no run, before a verb that reads it has imported torch.

    Raises:
        UsageError: it holds none, or a flag is wrong.
    """
    from cluster.cli.options import CheckpointOptions
    from pipeline.dataset.record import require_run
    from pipeline.tools.arguments import parse_options

    if issubclass(kind, CheckpointOptions):
        require_run(parse_options(kind, words, command).run)


def load_options(verb: Verb) -> type[Options]:
    """Return the dataclass of a verb's flags."""
    module, _, kind = verb.options.partition(":")
    found: type[Options] = getattr(importlib.import_module(module), kind)
    return found


def show_network(words: Sequence[str]) -> int:
    """Print the layer table of a config, which may be the bare name of a preset.

    Raises:
        UsageError: a flag is wrong, or there is no such config.
    """
    from cluster.cli.options import NetworkOptions
    from cluster.config import find_config
    from model.summary import show_summary
    from pipeline.tools.arguments import parse_options

    options = parse_options(NetworkOptions, words, "duet summary")
    show_summary(replace(options, config=find_config(options.config)))
    return 0


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
        lines += [group, *(f"  {name:<16}{verb.help}" for name, verb in verbs.items()), ""]
    lines += ["duet --version", "duet --print-completion bash|zsh|fish|tcsh", ""]
    return "\n".join(lines)


def format_completion(shell: str) -> str:
    """Return the script that completes verbs, their flags, choices and presets in a shell.

    The script holds all words: no Python runs when they are asked for.

    Raises:
        UsageError: a shell that shtab has no script for.
    """
    import shtab

    from cluster.config import PRESETS
    from pipeline.tools.help import list_flags

    if shell not in SHELLS:
        raise UsageError(f"--print-completion is {shell!r}; it takes {' or '.join(SHELLS)}")
    parser = argparse.ArgumentParser("duet")
    parser.add_argument("-V", "--version", action="store_true", help="show the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print this script")
    verbs = parser.add_subparsers(dest="verb")
    presets, studies = list_presets(PRESETS), list_presets(PRESETS / "studies")
    configs = [name for name in presets if "/" not in name]
    for name, verb in VERBS.items():
        one = verbs.add_parser(name, help=verb.help)
        if name == "presets":
            one.add_argument("action", choices=["copy"])
            one.add_argument("name", choices=presets)
        for flag in list_flags(load_options(verb), with_text=True) if verb.options else ():
            text = re.split(r"[.;:] ", flag.text, maxsplit=1)[0].rstrip(".").replace("%", "%%")
            if flag.field in ("config", "study"):
                known = studies if flag.field == "study" else configs
                one.add_argument(flag.field, choices=known, help=text)
            elif flag.is_positional:
                one.add_argument(flag.field, help=text).complete = shtab.FILE  # type: ignore[attr-defined]
            elif flag.is_switch:
                one.add_argument(*flag.spellings, action="store_true", help=text)
            else:
                added = one.add_argument(*flag.names, choices=flag.choices or None, help=text)
                if flag.kind == "PATH" or flag.field == "data":
                    added.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


def show_presets(words: Sequence[str]) -> int:
    """List the presets with the first sentence of each, or copy one.

    Args:
        words: nothing, or `copy NAME [TO]`; TO is a file or folder, the current one by default.

    Raises:
        UsageError: other words, no such preset, or a file of that name is there.
    """
    from cluster.config import PRESETS, find_config
    from pipeline.tools.help import NAMES, WIDEST

    if list(words[:1]) == ["copy"] and len(words) in (2, 3):
        source = find_config(Path(words[1]))
        target = Path(words[2] if len(words) == 3 else ".")
        target = target / source.name if target.is_dir() else target
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            raise UsageError(f"{target} is there already; name another file") from None
        is_study = PRESETS / "studies" in source.parents
        use = (
            f"study {target} --data DATA --out OUT"
            if is_study
            else f"train {target} --data DATA --run RUN"
        )
        sys.stderr.write(f"{target}: edit it, then duet {use}\n")
        return 0
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write("usage: duet presets\n       duet presets copy NAME [TO]\n")
        return 0
    if words:
        raise UsageError(
            f"duet presets takes no {' '.join(words)!r}; use duet presets, or duet presets copy "
            "NAME [TO]"
        )
    for name in list_presets(PRESETS):
        claim = shorten_claim(read_claim(PRESETS / f"{name}.toml"), WIDEST - NAMES)
        sys.stdout.write(f"{name:<{NAMES}}{claim}\n")
    return 0


def list_presets(folder: Path) -> list[str]:
    """List the names of the presets in a folder; those in folders of it last, as folder/name."""
    names = [str(one.relative_to(folder).with_suffix("")) for one in folder.rglob("*.toml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def shorten_claim(claim: str, most: int) -> str:
    """Return a claim of at most `most` characters: cut where a clause ends, or a word."""
    if len(claim) <= most:
        return claim
    end = max(claim.rfind(mark, 0, most + 1) for mark in ":;,")
    return claim[:end] if end > 0 else textwrap.shorten(claim, most, placeholder=" …")


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
