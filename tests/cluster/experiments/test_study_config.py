"""Study files: what they say is what is run, and what cannot work is refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import PRESETS, load_settings
from cluster.experiments.study.__main__ import sort_stages
from cluster.experiments.study.config import DataSubset, read_study
from cluster.run.folder import find_conflicts
from pipeline.tools.errors import UsageError

STUDIES_FOLDER = PRESETS / "studies"
STUDIES = sorted(STUDIES_FOLDER.rglob("*.toml"))
TEXT = """
title = "A against b"
claim = "b is slower"
paper = "6 times"
source = "section 3.1"
base = "base.toml"
seeds = [3, 4]
measure = "pictures"
plot = "train"
[settings]
width = 0.125
batch_size = 8
[grid]
lr = [0.01, 0.02]
[data.half]
classes = [0, 0.5]
per_class = 3
[variants.a]
[variants.b]
activation = "tanh"
"""


def written(folder: Path, text: str = TEXT) -> Path:
    (folder / "base.toml").write_text("width = 0.5\nmomentum = 0.8\nsteps = 6\n")
    (folder / "ab.toml").write_text(text)
    return folder / "ab.toml"


def test_settings_come_from_base_study_variant_and_grid_in_this_order(tmp_path):
    study = read_study(written(tmp_path))
    a, b = study.variants
    assert (study.name, study.seeds, study.grid) == ("ab", (3, 4), ("lr", (0.01, 0.02)))
    assert (a.data, study.subsets) == (
        "half",
        {"half": DataSubset(classes=(0.0, 0.5), per_class=3)},
    )
    config = study.make_config(b, 4, 0.02)
    assert (config.design.width, config.momentum, config.steps, config.batch_size) == (
        0.125,
        0.8,
        6,
        8,
    )
    assert (config.seed, config.lr, config.design.activation) == (4, 0.02, "tanh")
    assert study.make_config(a, 3).design.activation == "relu"
    assert a.values == (0.01, 0.02)
    (other,) = read_study(written(tmp_path, TEXT + "values = [0.1, 0.2, 0.4]\n")).variants[1:]
    assert other.values == (0.1, 0.2, 0.4)
    assert study.goals == (0.25,)
    for text, goals in (("0.5", (0.5,)), ("[0.45, 0.4]", (0.45, 0.4))):
        assert read_study(written(tmp_path, f"goal = {text}\n{TEXT}")).goals == goals


def test_a_variant_comes_after_the_one_it_starts_from(tmp_path):
    more = TEXT + 'after = "a"\n[variants.c]\nafter = "b"\n[variants.d]\nhidden = true\n'
    study = read_study(written(tmp_path, more))
    names = [[one.name for one in stage] for stage in sort_stages(study.variants)]
    assert names == [["a", "d"], ["b"], ["c"]]
    assert [one.name for one in study.shown] == ["a", "b", "c"]
    assert study.make_config(study.variants[1], 3, init="runs/a").init == "runs/a"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "titel", "no key 'titel'"),
        ('measure = "pictures"', 'measure = "speed"', "measure is 'speed'; it takes pictures, "),
        ("seeds = [3, 4]", "seeds = [3, 3]", "seeds is [3, 3]; each must be there once"),
        (
            "seeds = [3, 4]",
            "seeds = [3]\ngoal = [0.2, 0.4]",
            "goal is [0.2, 0.4]; each must be below",
        ),
        ("seeds = [3, 4]", "seeds = [3]\ngoal = [0.2, 1.5]", "goal is [0.2, 1.5]; it takes errors"),
        ("seeds = [3, 4]", "seeds = [3]\ngoal = []", "goal is []; it takes errors above 0 and"),
        ("seeds = [3, 4]", "seeds = [3]\nwindow = inf", "window is inf; it takes a number of"),
        ("seeds = [3, 4]", "seeds = [3]\nwindow = 0.5", "window is 0.5; it takes a number of"),
        ("seeds = [3, 4]", "seeds = [3]\nwindow = -1", "window is -1; it takes a number of images"),
        ("lr = [0.01, 0.02]", "lr = [0.01, 0.01]", "[grid] lr is [0.01, 0.01]; give each value"),
        ("lr = [0.01, 0.02]", "seed = [3, 5]", "[grid] has seed; give seeds"),
        ("seeds = [3, 4]", "seeds = []", "seeds is []; it takes a list of whole numbers"),
        ("width = 0.125", "widht = 0.125", "[settings] has 'widht', which is no setting"),
        ("width = 0.125", "width = true", "[settings] width is True, which that setting"),
        ("lr = [0.01, 0.02]", "lr = 0.01", "[grid] lr is 0.01; it takes a list of two values"),
        ("lr = [0.01, 0.02]", "lr = [0.01, 0.02]\nseed = [1, 2]", "[grid] has lr, seed; give one"),
        ("[0, 0.5]", "[0.5, 0]", "[data.half] classes is [0.5, 0]; it takes two shares"),
        ("per_class = 3", "per_class = -3", "[data.half] per_class is -3; it takes a whole"),
        ("[variants.a]", '[variants.a]\ndata = "third"', "variant a: no [data.third]"),
        ("[variants.a]", '[variants.a]\nafter = "b"', "variant a: after 'b' is no variant above"),
        ("batch_size = 8", "batch_size = 0", "study ab, variant a: batch_size is 0"),
        ("[variants.b]", "[variants.b", "is not TOML"),
        ("[variants.b]", "[variants.b]\nvalues = [true]", "[grid] lr is True, which that setting"),
        ("[grid]\nlr = [0.01, 0.02]", "[variants.c]\nvalues = [1.0]", "values is [1.0]; it takes"),
        ('paper = "6 times"', "paper = 6", "paper is 6; it takes text"),
        ("base.toml", "basis.toml", "basis.toml cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(UsageError) as error:
        read_study(written(tmp_path, TEXT.replace(old, new, 1)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_can_be_run_and_its_variants_differ(path):
    study = read_study(path)
    seed, value = study.seeds[0], (study.grid[1] or (None,))[0]
    configs = [study.make_config(one, seed, value) for one in study.variants]
    for number, (one, variant) in enumerate(zip(configs, study.variants, strict=True)):
        for other, config in zip(study.variants[:number], configs, strict=False):
            same_start = (one.steps, variant.data, variant.after) == (
                config.steps, other.data, other.after
            )  # fmt: skip
            assert not same_start or find_conflicts(config, one, 1000)
    assert load_settings(study.base)
    name = path.relative_to(STUDIES_FOLDER).with_suffix("")
    assert f"duet study {name} --data" in path.read_text()
    assert read_study(name) == study
