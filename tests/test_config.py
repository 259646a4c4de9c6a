"""Settings: file and flags, who wins, and what the user is told about a mistake."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import FREE, Config, differences
from cluster.config_file import as_toml, parse, read_back
from model.changes import parse_changes
from model.design import Design
from model.schedule import in_force
from pipeline.errors import UsageError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def settings(tmp_path: Path):
    """Parse a config file of the given text, with the given flags."""

    def of(text: str, *flags: str) -> Config:
        path = tmp_path / "some.toml"
        path.write_text(text, encoding="utf-8")
        return parse([str(path), "--data", "d", "--run", "r", *flags]).settings

    return of


def test_flags_win_over_the_file_and_the_file_over_the_defaults(settings):
    found = settings("width = 0.5\nseed = 3\nrelu_first = false", "--seed", "4", "--relu-first")
    assert found == Config(width=0.5, seed=4)


def test_the_file_is_the_positional_argument_and_nothing_else(tmp_path):
    path = tmp_path / "settings"  # whatever it is called
    path.write_text("steps = 7", encoding="utf-8")
    for data, run in (("d", "steps"), ("d.toml", "epochs")):
        found = parse(["--data", data, "--run", run, str(path)])
        assert (found.settings.steps, found.data, found.run) == (7, data, Path(run))
    with pytest.raises(UsageError, match="nowhere cannot be read"):
        parse([str(tmp_path / "nowhere"), "--data", "d", "--run", "r"])


def test_a_whole_number_will_do_for_a_float(settings):
    assert settings("lr = 1").lr == 1.0


def test_a_length_on_the_command_line_wins_over_the_other_kind_in_the_file(settings):
    assert settings("steps = 400", "--epochs", "2").total_steps(640) == 10
    assert settings("epochs = 3.0", "--steps", "7").total_steps(640) == 7


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("widht = 0.5", (), ["some.toml", "'widht'", "did you mean 'width'?"]),
        ("zzz = 1", (), ["some.toml", "'zzz'", "there are", "batch_size"]),
        ("width = 'half'", (), ["some.toml", "width", "'half'", "a number"]),
        ("batch_size = 12.5", (), ["some.toml", "batch_size", "12.5", "a whole number"]),
        ("batch_size = true", (), ["batch_size", "True", "a whole number"]),
        ("ledger = 1", (), ["ledger", "true or false"]),
        ("replicas = 1.5", (), ["replicas", "1.5", "a whole number or text"]),
        ("", ("--replicas", "4:1"), ["replicas", "4:1", "as in 1:4"]),
        ("", ("--replicas", "0:2"), ["replicas", "0:2", "as in 1:4"]),
        ("", ("--replicas", "many"), ["replicas", "many", "as in 1:4"]),
        ("dtype = 'float16'", (), ["dtype", "'float16'", "'bfloat16'"]),
        ("[model]\nwidth = 1", (), ["some.toml", "'model'"]),
        ("width = ", (), ["some.toml", "is not TOML"]),
        ("batch_size = 127", (), ["batch_size", "127", "126 or 128"]),
        ("", ("--replicas", "3"), ["batch_size", "128", "multiple of 6", "126 or 132"]),
        ("lr = -0.1", (), ["lr", "-0.1", "above 0"]),
        ("lr = nan", (), ["lr", "nan"]),
        ("width = inf", (), ["width", "inf", "finite"]),
        ("momentum = 1.0", (), ["momentum", "1.0", "below 1"]),
        ("epochs = 0", (), ["epochs", "steps"]),
        ("keep = 0", (), ["keep", "0"]),
        ("validate_every = -1", (), ["validate_every", "-1"]),
        ("width = 0.01", (), ["width is 0.01", "smallest that makes sense"]),
        ("pool = '4/2'", (), ["some.toml", "pool", "'4/2'", "'3/2' or '2/2'"]),
        ("norm = 'none'\nspatial_norm = true", (), ["spatial_norm", "'lrn'"]),
        ("norm = 'batch'\nspatial_norm = true", (), ["spatial_norm", "'lrn'", "'batch'"]),
        ("norm = 'layer'", (), ["norm", "'layer'", "'lcn'"]),
        ("net = 'four'\nconv6 = true", (), ["conv6", "net = 'four'"]),
        ("net = 'four'\nlayer_rates = ['fc8=1']", (), ["layer_rates", "'fc8'"]),
        ("changes = 'x'", (), ["changes", "a list of texts"]),
        ("changes = ['25 lr 0.1']", (), ["changes: lr", "schedule = 'manual'"]),
        ("changes = ['5 lr.conv9 0']", (), ["'5 lr.conv9 0'", "'lr.conv9'", "did you mean"]),
        ("without = 'conv3'\nlayer_rates = ['conv3=0']", (), ["layer_rates", "'conv3'"]),
        ("plateau_threshold = 1.0", (), ["plateau_threshold is 1.0", "below 1"]),
        ("plateau_factor = 0.1", (), ["plateau_factor is 0.1", "above 1"]),
        ("patience = -1", (), ["patience is -1", "0 or above"]),
        ("schedule = 'plateau'\nvalidate_every = 0", (), ["validate_every is 0", "above 0"]),
        ("columns = 1", ("--replicas", "3"), ["batch_size", "replicas x 1 columns"]),
    ],
)
def test_a_mistake_gets_one_line_with_the_setting_its_value_and_the_way_out(
    settings, text, flags, words
):
    with pytest.raises(UsageError) as caught:
        settings(text, *flags)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read \(No such file"):
        parse(["nowhere.toml", "--data", "d", "--run", "r"])


@pytest.mark.parametrize(
    "argv", [["--data", "d", "--run", "r"], ["x.yaml", "--widht", "1"]], ids=["none", "flag"]
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    missing = [f.name for f in fields(Config) if f.name.replace("_", "-") not in shown]
    assert missing == []


def test_the_public_settings_are_these():
    assert [field.name for field in fields(Config)] == [
        "width", "columns", "net", "norm", "relu_first", "spatial_norm", "pool", "activation",
        "without", "conv6", "dropout", "init", "seed", "batch_size", "epochs", "steps", "schedule",
        "rate_scaling", "lr", "bias_factor", "lr_drop", "lr_drops", "bias_drop", "bias_drops",
        "changes", "patience", "plateau_drops", "plateau_factor", "plateau_biases",
        "plateau_threshold", "layer_rates", "momentum", "weight_decay", "shuffle", "window",
        "augment", "colour", "colour_divide", "mean", "dtype", "exchange_dtype", "replicas",
        "columns_per_worker", "microbatch", "device", "threads", "checkpoint_every", "keep",
        "keep_best", "store", "validate_every", "statistics_every", "max_failures", "node_wait",
        "collective_timeout", "strict", "ledger", "tensorboard", "cache", "cache_size",
    ]  # fmt: skip


positive = st.floats(1e-6, 1e6)
configs = st.builds(
    Config,
    width=st.floats(0.03, 1e3),
    columns=st.sampled_from([1, 2]),
    schedule=st.sampled_from(["dexp", "plateau", "manual"]),
    changes=st.lists(st.sampled_from(["3 colour 0", "1.5 lr.conv1 0.1"]), max_size=2).map(tuple),
    layer_rates=st.sampled_from([(), ("fc8=10", "conv1=0")]),
    relu_first=st.booleans(),
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 999).map(lambda half: 2 * half),
    epochs=positive,
    steps=st.integers(0, 10**7),
    lr=positive,
    colour=st.floats(0, 10),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    replicas=st.sampled_from([1, "1", "1:4"]),
    columns_per_worker=st.sampled_from([1, 2]),
    shuffle=st.sampled_from(["full", "block"]),
    strict=st.booleans(),
    cache=st.sampled_from(["", "/tmp/a b", "c"]),
)


@given(configs)
def test_the_effective_config_reads_back_to_itself(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(as_toml(config, "abc"), encoding="utf-8")
    assert read_back(path) == (config, "abc")
    assert parse([str(path), "--data", "d", "--run", "r"]).settings == config


@given(st.floats(0.01, 100), st.integers(1, 10**6), st.integers(1, 512).map(lambda n: 2 * n))
def test_epochs_are_rounded_up_to_whole_steps(epochs, samples, batch_size):
    steps = Config(epochs=epochs, batch_size=batch_size).total_steps(samples)
    assert steps >= 1
    assert steps * batch_size >= epochs * samples * (1 - 1e-9)
    assert (steps - 1) * batch_size < epochs * samples or steps == 1


OTHER = {
    "width": 0.5, "seed": 1, "batch_size": 256, "epochs": 9.0, "steps": 201, "lr": 0.1,
    "bias_factor": 1.0, "lr_drop": 10.0, "lr_drops": 2, "bias_drop": 5.0, "bias_drops": 3,
    "momentum": 0.5, "weight_decay": 0.1, "shuffle": "block", "window": 8,
    "colour": 0.0, "dtype": "bfloat16", "columns": 1, "norm": "none", "relu_first": False,
    "spatial_norm": True, "pool": "2/2", "activation": "tanh", "without": "conv4",
    "net": "four", "conv6": True, "dropout": False, "init": "runs/other", "augment": False,
    "schedule": "manual", "rate_scaling": "sqrt", "changes": ("1 colour 0",), "patience": 9,
    "plateau_biases": False, "plateau_drops": 1, "plateau_factor": 2.0, "plateau_threshold": 0.1,
    "layer_rates": ("conv1=0",), "colour_divide": True, "mean": "picture",
    "exchange_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in fields(Config) if f.name not in FREE])
def test_what_a_run_learns_cannot_change_under_way(field):
    old = Config(steps=400)
    new = replace(old, **{field: OTHER[field]})
    found = differences(old, new, samples=4000)
    if field == "epochs":  # steps decide, so nothing changes
        assert found == []
    elif field == "schedule":  # manual: the length matters no more
        assert found == ["schedule: dexp -> manual"]
    elif field == "steps":
        assert found == ["length in steps: 400 -> 201 (learning rates drop by it)"]
    else:
        assert found == [f"{field}: {getattr(old, field)} -> {OTHER[field]}"]


@pytest.mark.parametrize(
    ("batch", "replicas", "sizes", "micro"),
    [
        (128, 1, (1,), {1: 128}),
        (128, "1:4", (1, 2, 4), {1: 32, 2: 32, 4: 32}),
        (128, "2:7", (2, 4), {2: 32, 4: 32}),
        (12, "1:99", (1, 2, 3, 6), {1: 2, 3: 2, 6: 2}),
    ],
)
def test_a_batch_is_shared_out_evenly_whatever_the_number_of_replicas(
    batch, replicas, sizes, micro
):
    found = Config(batch_size=batch, replicas=replicas)
    assert found.replica_sizes == sizes
    assert {count: found.micro(count) for count in micro} == micro
    assert Config(batch_size=batch, replicas=replicas, microbatch=1).micro(sizes[0]) == 1


def test_how_a_run_is_carried_out_may_change():
    old = Config()
    free = {
        "replicas": "1:2", "device": "cpu", "columns_per_worker": 2, "microbatch": 16,
        "threads": 3, "checkpoint_every": 7, "keep": 9, "keep_best": 0, "store": "s3://b/x",
        "validate_every": 0, "statistics_every": 0, "max_failures": 0, "node_wait": 0,
        "collective_timeout": 10, "strict": True, "ledger": True, "tensorboard": True,
        "cache": "c", "cache_size": "1TB",
    }  # fmt: skip
    assert set(free) == set(FREE)
    assert differences(old, replace(old, **free), samples=4000) == []


def test_plateau_counts_validations():
    old = Config(schedule="plateau")
    found = differences(old, replace(old, validate_every=7, checkpoint_every=7), samples=4000)
    assert found == ["validate_every: 500 -> 7"]


def test_what_batch_normalisation_sees_at_once_stays_however_many_replicas_there_are():
    old = Config(norm="batch", replicas="1:4")
    assert {old.micro(count) for count in old.replica_sizes} == {32}
    assert differences(old, replace(old, replicas="2:4"), samples=4000) == []
    assert differences(old, replace(old, replicas=4), samples=4000) == []
    for changes in ({"replicas": 1}, {"microbatch": 16}):
        (found,) = differences(old, replace(old, **changes), samples=4000)
        assert "normalised together: 32 -> " in found
    assert {replace(old, microbatch=64).micro(count) for count in old.replica_sizes} == {32}


def test_the_length_may_change_where_no_rate_depends_on_it():
    old = Config(steps=400, lr_drops=1, bias_drops=1)
    assert differences(old, replace(old, steps=600), samples=4000) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_of_the_repository_are_sound_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    parse([str(path), "--data", "d", "--run", "r"])
    head = text[: text.index("\n\n")]
    preset = path.stem not in ("demo", "narrow")
    assert not preset or "source" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"python -m cluster.train configs/{path.name} --data" in head
    assert "hardware" in head
    assert "expected" in head
    assert tomllib.loads(text)


def test_presets_say_what_is_known_of_them():
    """A claim each: what differs from the paper's network, and the published number."""
    presets = {path.stem: parse([str(path), "--data", "d", "--run", "r"]).settings
               for path in CONFIGS}  # fmt: skip
    heads = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS}
    source = {"relu_first": False, "spatial_norm": True}
    assert presets["paper"].design == Design()
    for name, design in {
        "dexp": Design(**source),
        "source2012": Design(**source),
        "one_gpu": Design(columns=1, **source),
        "no_lrn": Design(norm="none", relu_first=False),
        "pool2": Design(pool="2/2", **source),
        "tanh": Design(activation="tanh", **source),
        "norm_spatial": Design(norm="spatial", relu_first=False),
        "norm_lcn": Design(norm="lcn", relu_first=False),
        "norm_batch": Design(norm="batch", relu_first=False),
        "no_dropout": Design(dropout=False, **source),
        "conv6": Design(conv6=True, **source),
        "no_conv3": Design(without="conv3", **source),
        "no_conv4": Design(without="conv4", **source),
        "no_conv5": Design(without="conv5", **source),
    }.items():
        assert presets[name].design == design, name
        full = replace(presets[name], **{key: getattr(presets["dexp"], key) for key in vars(
            Design(columns=2))})  # fmt: skip
        if name != "source2012":  # an ablation differs from dexp by its network alone
            assert full == presets["dexp"], name
    for name, changed in {
        "no_augment": {"augment": False},
        "no_decay": {"weight_decay": 0.0},
        "no_colour": {"colour": 0.0, "colour_divide": False, "changes": ("74 lr.conv1 0",)},
    }.items():
        assert presets[name] == replace(presets["dexp"], **changed), name
    tuned = presets["finetune"]
    assert tuned.design == Design(conv6=True, **source)
    rates = in_force(tuned.lr, tuned.lr * tuned.bias_factor,
                     [(c.name, c.value) for c in parse_changes(
                         tuned.changes, [layer.name for layer in tuned.design.layers()]
                     ) if c.epoch == 0])  # fmt: skip
    assert [rates.of(f"{name}.weight") for name in ("conv1", "conv6", "fc8")] == [1e-4, 1e-3, 0.01]
    assert {rates.of(f"{name}.bias") for name in ("conv1", "conv6", "fc8")} == {0.02}
    four = presets["four"]
    assert (four.weight_decay, four.augment, four.norm, four.columns) == (0.0, False, "none", 1)
    assert "42.34" in heads["dexp"]
    assert "18.05" in heads["dexp"]
    assert presets["source2012"].colours == ((0, 0.1), (67, 0.0))
    assert presets["dexp"].colours == ((0, 0.1), (68, 0.0))
    assert presets["dexp"].epochs == 95  # layer-params-169.cfg, from which 170 went on
    assert "a pair of GPUs" not in heads["one_gpu"]
