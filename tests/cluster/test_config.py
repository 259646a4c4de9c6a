"""Settings: file and flags, who wins, and what the user is told about a mistake."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.loader import parse_settings
from cluster.config import (
    ALIASES,
    MEANT,
    PRESETS,
    TYPES,
    Config,
    find_config,
    load_settings,
    read_run_config,
    suggest_setting,
)
from cluster.run.folder import format_toml
from cluster.train import parse_command, resolve_paths
from model.architecture import Design
from pipeline.tools.errors import UsageError


@pytest.fixture
def settings(tmp_path: Path):
    """Parse a config file of the given text, with the given flags."""

    def of(text: str, *flags: str) -> Config:
        path = tmp_path / "some.toml"
        path.write_text(text, encoding="utf-8")
        return parse_command([str(path), "--data", "d", "--run", "r", *flags]).settings

    return of


def test_flags_win_over_the_file_and_the_file_over_the_defaults(settings):
    found = settings("width = 0.5\nseed = 3\nrelu_first = false", "--seed", "4", "--relu-first")
    assert found == Config(design=Design(width=0.5), seed=4)


def test_the_file_is_the_positional_argument_and_nothing_else(tmp_path):
    path = tmp_path / "settings"  # whatever it is called
    path.write_text("steps = 7", encoding="utf-8")
    for data, run in (("d", "steps"), ("d.toml", "epochs")):
        found = parse_command(["--data", data, "--run", run, str(path)])
        assert (found.settings.steps, found.data, found.run) == (7, data, Path(run))
    with pytest.raises(UsageError, match="nowhere cannot be read"):
        parse_command([str(tmp_path / "nowhere"), "--data", "d", "--run", "r"])


def test_a_whole_number_will_do_for_a_float(settings):
    assert settings("lr = 1").lr == 1.0


def test_a_text_of_a_file_may_begin_with_a_dash(settings):
    found = settings('cache = "-x"\ninit = "--seed"\nchanges = ["1 colour 0"]', "--seed", "3")
    assert (found.cache, found.init, found.seed) == ("-x", "--seed", 3)
    with pytest.raises(UsageError, match="layer_rates"):
        settings('layer_rates = ["-conv1=0"]')


def test_a_length_on_the_command_line_wins_over_the_other_kind_in_the_file(settings):
    assert settings("steps = 400", "--epochs", "2").total_steps(640) == 10
    assert settings("epochs = 3.0", "--steps", "7").total_steps(640) == 7


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("widht = 0.5", (), ["some.toml", "'widht'", "did you mean 'width'?"]),
        ("learning_rate = 1", (), ["some.toml", "'learning_rate'", "did you mean 'lr'?"]),
        ("Batch-Size = 1", (), ["'Batch-Size'", "did you mean 'batch_size'?"]),
        ("", ("--learning-rate", "1"), ["no flag --learning-rate", "did you mean --lr?"]),
        ("", ("--bs=8",), ["no flag --bs", "did you mean --batch-size?"]),
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
        ("width = inf", (), ["width is inf", "finite"]),
        ("momentum = 1.0", (), ["momentum", "1.0", "below 1"]),
        ("epochs = 0", (), ["epochs", "steps"]),
        ("keep = 0", (), ["keep", "0"]),
        ("validate_every = -1", (), ["validate_every", "-1"]),
        ("width = 0.01", (), ["width is 0.01", "smallest that makes sense"]),
        ("pool = '4/2'", (), ["some.toml", "pool", "'4/2'", "'3/2' or '2/2'"]),
        ("norm = 'none'\nspatial_norm = true", (), ["spatial_norm", "'lrn'"]),
        ("norm = 'batch'\nspatial_norm = true", (), ["spatial_norm", "'lrn'", "'batch'"]),
        ("norm = 'layer'", (), ["norm", "'layer'", "'lcn'"]),
        ("norm_layers = 'x'", (), ["norm_layers", "a list of texts"]),
        ("norm_layers = ['conv2']", (), ["norm_layers: 'conv2'", "LAYER=NORM"]),
        ("norm_layers = ['fc6=lrn']", (), ["'fc6=lrn'", "'fc6'", "there are conv1, conv2"]),
        ("norm_layers = ['conv2=lrm']", (), ["'conv2=lrm'", "'lrm'", "there are lrn, scale"]),
        ("norm_layers = ['conv2=lrn', 'conv2=lcn']", (), ["conv2 has a norm already"]),
        ("norm_layers = ['conv2=lcn']\nspatial_norm = true", (), ["spatial_norm", "'lcn'"]),
        ("norm_layers = ['conv4=batch']\nexact = true", (), ["'batch'", "exact"]),
        ("lrn_k = 0", (), ["lrn_k is 0", "above 0"]),
        ("lrn_size = 4", (), ["lrn_size is 4", "odd"]),
        ("lrn_alpha = -1", (), ["lrn_alpha is -1", "from 0 up"]),
        ("lrn_beta = inf", (), ["lrn_beta is inf", "from 0 up"]),
        ("image_size = 227\nnet = 'four'", (), ["image_size is 227", "net = 'paper'"]),
        ("image_size = 32", (), ["image_size is 32", "four"]),
        ("lrn_across = true\ncolumns = 1", (), ["lrn_across", "columns = 2"]),
        (
            "lrn_across = true\ncolumns_per_worker = 1",
            (),
            ["columns_per_worker is 1", "lrn_across"],
        ),
        ("lrn_across = true\nexact = true", (), ["lrn_across is True and exact is true"]),
        ("bottleneck = -1", (), ["bottleneck is -1", "from 0"]),
        ("communication = false\ncolumns = 1", (), ["communication", "columns = 2"]),
        ("layer_decays = ['fc9=1']", (), ["layer_decays: 'fc9=1'", "'fc9'"]),
        ("milestones = ['95 top1']", (), ["milestones: '95 top1'", "EPOCH NAME VALUE"]),
        ("milestones = ['95 top2 1']", (), ["'95 top2 1'", "loss, top1, top5"]),
        ("milestones = ['95 top1 x']", (), ["'95 top1 x'", "EPOCH NAME VALUE"]),
        ("milestones = ['nan loss 1']", (), ["'nan loss 1'", "EPOCH NAME VALUE"]),
        ("init_layers = 'fc'", (), ["init_layers", "'fc'", "'conv'"]),
        ("exchange_dtype = 'half'", (), ["exchange_dtype", "'float16'"]),
        ("lars = -1", (), ["lars is -1", "0 or above"]),
        ("warmup = 90", (), ["warmup is 90", "below epochs (90)"]),
        ("warmup_lr = 0.001", (), ["warmup_lr is 0.001", "goes with warmup"]),
        ("warmup = 5\nwarmup_lr = 1", (), ["warmup_lr is 1", "lr (0.01) at most"]),
        ("lr_power = 0", (), ["lr_power is 0", "above 0"]),
        ("schedule = 'poly'\nchanges = ['2 lr 1']", (), ["changes: lr", "'manual'"]),
        ("middle_std = -1", (), ["middle_std is -1", "from 0 up"]),
        ("net = 'local11'\nbottleneck = 8", (), ["bottleneck is 8", "net = 'local11'"]),
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
        ("columns = 3", (), ["columns is 3"]),
        (f"steps = {10**20}", (), ["steps is 100000000000000000000", "at most 1000000000"]),
        ("", ("--steps", f"{10**20}"), ["steps is 1000", "at most"]),
        (f"batch_size = {10**14}", (), ["batch_size is 100000000000000", "at most"]),
        ("batch_size = 2097152", (), ["batch_size is 2097152", "from 1 to 1048576"]),
        ("prefetch = 1000000000", (), ["prefetch is 1000000000", "from 1 to 1000"]),
        ("width = 1e300", (), ["width is 1e+300", "32 at most"]),
        (f"width = {10**400}", (), ["width is inf", "32 at most"]),
        (f"lr = {10**400}", (), ["lr is inf", "finite"]),
        (f"epochs = {10**400}", (), ["epochs is inf", "finite"]),
        ("epochs = 1e300", (), ["epochs is 1e+300", "at most 1000000"]),
        ("window = 1000000000", (), ["window is 1000000000", "from 1 to"]),
        ("colour = 1e300", (), ["colour=", "numbers up to 1000"]),
        ("changes = ['1e300 colour 0']", (), ["colour=", "in epochs up to"]),
        (f"seed = {2**63}", (), ["seed is 9223372036854775808", "at most"]),
        ("lr_drops = 1000000", (), ["lr_drops is 1000000", "at most 1000"]),
        (f"collective_timeout = {10**18}", (), ["collective_timeout", "at most"]),
        (f"keep = {'9' * 5000}", (), ["some.toml", "is not TOML"]),
        (f"changes = {'[' * 5000}", (), ["some.toml", "is not TOML"]),
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


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "demo.toml",
        "configs/demo.toml",
        "cluster/configs/demo.toml",
        "cluster/config/presets/demo.toml",
    ],
)
def test_a_preset_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    """Also by the path that earlier versions had, or that it has in the repository."""
    monkeypatch.chdir(tmp_path)
    assert load_settings(Path(name)) == load_settings(PRESETS / "demo.toml")
    assert find_config(Path("small/figure1"), PRESETS / "studies").is_file()
    Path("demo.toml").write_text("seed = 7", encoding="utf-8")
    assert load_settings(Path("demo.toml")) == {"seed": 7}  # a file here comes first


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [
        ("dexq", PRESETS, ["dexq cannot be read", "did you mean dexp?"]),
        ("zzz", PRESETS, ["zzz cannot be read", "there are batch256, conv6, demo"]),
        ("small/figure2", PRESETS / "studies", ["small/figure2", "did you mean small/figure1"]),
    ],
)
def test_an_unknown_preset_gets_one_line_with_the_nearest_names(name, folder, words):
    with pytest.raises(UsageError) as caught:
        find_config(Path(name), folder)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_settings_of_an_older_run_are_read_from_its_flat_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('width = 0.5\nnorm = "none"\nseed = 3\ndata_sha256 = "ab"\n')
    config = Config(design=Design(width=0.5, norm="none"), seed=3)
    assert read_run_config(path) == (config, "ab")


def test_every_alias_means_a_setting_and_is_none_itself():
    assert set(ALIASES) <= set(TYPES)
    aliases = [alias for names in ALIASES.values() for alias in names]
    assert not set(aliases) & set(TYPES)
    assert len(MEANT) == len(aliases)  # none means two
    for alias, name in (("epoch", "epochs"), ("wd", "weight_decay"), ("workers", "threads")):
        assert suggest_setting(alias) == f"did you mean {name!r}?"


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read \(No such file"):
        parse_command(["nowhere.toml", "--data", "d", "--run", "r"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data", "d", "--run", "r"], "CONFIG is missing; python -m cluster.train --help says"),
        ([], "CONFIG, --run are missing"),
        (["x.yaml", "--widht", "1"], "has no flag --widht; did you mean --width or --window?"),
        (["dexp", "--data", "d", "--run"], "--run has no value; give one"),
        (["dexp", "two", "--data", "d", "--run", "r"], "Unrecognized options: two"),
        (["dexp", "--steps", "many"], "--steps is 'many'; it takes a whole number"),
        (["dexp", "--lr=fast"], "--lr is 'fast'; it takes a number"),
        (["dexp", "--dtype", "half"], "--dtype is 'half'; it takes auto or float32 or bfloat16"),
    ],
)
def test_wrong_usage_is_one_line_with_the_way_out(argv, line, capsys):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        parse_command(argv)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    missing = [name for name in Config().to_settings() if name.replace("_", "-") not in shown]
    assert missing == []


def test_the_public_settings_are_these():
    assert list(Config().to_settings()) == [
        "width", "columns", "net", "layers", "image_size", "norm", "norm_layers", "lrn_k",
        "lrn_size", "lrn_alpha", "lrn_beta", "lrn_across", "relu_first", "spatial_norm", "pool",
        "activation", "without", "conv6", "bottleneck", "communication", "middle_std", "dropout",
        "init", "init_layers", "seed", "batch_size", "epochs",
        "steps", "schedule", "rate_scaling", "lr", "bias_factor", "lr_drop", "lr_drops",
        "bias_drop", "bias_drops", "lr_power", "warmup", "warmup_lr",
        "changes", "patience", "plateau_drops", "plateau_factor", "plateau_biases",
        "plateau_threshold", "layer_rates", "momentum", "weight_decay", "layer_decays", "lars",
        "shuffle", "window",
        "augment", "colour", "colour_divide", "mean", "dtype", "exchange_dtype", "replicas",
        "columns_per_worker", "microbatch", "exact", "device", "cuda_graph", "threads", "prefetch",
        "hw_decoder_load", "checkpoint_every", "keep",
        "keep_best", "store", "milestones", "validate_every", "statistics_every", "max_failures",
        "node_wait",
        "spares", "collective_timeout", "strict", "data_version", "ledger", "tensorboard", "wandb",
        "mlflow", "cache", "cache_size",
    ]  # fmt: skip


positive = st.floats(1e-6, 1e6)
configs = st.builds(
    Config,
    design=st.builds(
        Design,
        width=st.floats(0.03, 32),
        columns=st.sampled_from([1, 2]),
        relu_first=st.booleans(),
    ),
    schedule=st.sampled_from(["dexp", "plateau", "manual"]),
    changes=st.lists(st.sampled_from(["3 colour 0", "1.5 lr.conv1 0.1"]), max_size=2).map(tuple),
    layer_rates=st.sampled_from([(), ("fc8=10", "conv1=0")]),
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 999).map(lambda half: 2 * half),
    epochs=positive,
    steps=st.integers(0, 10**7),
    lr=positive,
    colour=st.floats(0, 10),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    replicas=st.sampled_from([1, "1", "1:4"]),
    columns_per_worker=st.sampled_from(["auto", 1, 2]),
    shuffle=st.sampled_from(["full", "block"]),
    strict=st.booleans(),
    cache=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
    | st.sampled_from(["", "/tmp/a b", "🚀", 'a\x7f"\\\n']),
)


@given(configs)
def test_the_effective_config_reads_back_to_itself(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(format_toml(config, "abc"), encoding="utf-8")
    assert read_run_config(path) == (config, "abc")


@hypothesis.settings(max_examples=8)
@given(configs)
def test_a_command_reads_the_effective_config_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(format_toml(config, "abc"), encoding="utf-8")
    assert parse_command([str(path), "--data", "d", "--run", "r"]).settings == config


def test_what_started_a_run_is_no_setting_of_it(tmp_path):
    path = tmp_path / "config.toml"
    origin = {"config": 'a "b".toml', "command": "duet train 'a \"b\".toml' --seed 3", "commit": ""}
    path.write_text(format_toml(Config(seed=3), "abc", "name", origin), encoding="utf-8")
    assert read_run_config(path) == (Config(seed=3), "abc")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {key: table.get(key, "") for key in origin} == origin


@pytest.mark.parametrize("value", ["a\udcff", "\ud83d", "a\0b"])
def test_text_that_no_file_can_hold_is_refused_by_its_setting(value, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"store is .*; it must be UTF-8 text without NUL"):
        Config(store=value)
    with pytest.raises(ValueError, match="init is "):
        Config(init=value)
    with pytest.raises(UsageError, match="store is ") as caught:
        parse_command(["dexp", "--data", "d", "--run", "r", f"--store={value}"])
    assert "\n" not in str(caught.value)
    if value == "a\udcff":  # a working folder that is named in Latin-1
        (tmp_path / value).mkdir()
        monkeypatch.chdir(tmp_path / value)
        with pytest.raises(UsageError, match=r"cache is .* UTF-8"):
            resolve_paths(Config(cache="here"))


@given(st.floats(0.01, 100), st.integers(1, 10**6), st.integers(1, 512).map(lambda n: 2 * n))
def test_epochs_are_rounded_up_to_whole_steps(epochs, samples, batch_size):
    steps = Config(epochs=epochs, batch_size=batch_size).total_steps(samples)
    assert steps >= 1
    assert steps * batch_size >= epochs * samples * (1 - 1e-9)
    assert (steps - 1) * batch_size < epochs * samples or steps == 1


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
    assert {count: found.microbatch_size(count) for count in micro} == micro
    assert Config(batch_size=batch, replicas=replicas, microbatch=1).microbatch_size(sizes[0]) == 1


@pytest.mark.parametrize(
    ("settings", "sizes", "micro"),
    [
        ({}, (1,), 128),
        ({"replicas": "1:4"}, (1, 2, 4), 32),
        ({"replicas": "3:7"}, (4,), 32),
        ({"replicas": "1:8", "microbatch": 32}, (1, 2, 4), 32),
        ({"replicas": 2, "microbatch": 128, "batch_size": 384}, None, "192, 96, 48, 24, 12, 6, 3"),
        ({"replicas": "1:99", "batch_size": 12}, (1, 2), 6),
        ({"replicas": 3}, None, "replicas is 3; it must be, with exact, one of 1, 2, 4, 8, 16"),
        ({"replicas": 4, "microbatch": 64}, None, "and microbatch 64, one of 1, 2"),
        ({"microbatch": 24}, None, "microbatch is 24; it must be, with exact, one of 128, 64, 32"),
        ({"batch_size": 9}, None, "batch_size is 9; it must be a multiple of 2"),
        ({"design": Design(norm="batch")}, None, "norm is 'batch' and exact is true"),
    ],
)
def test_exact_replicas_and_micro_batches_make_a_balanced_tree(settings, sizes, micro):
    if sizes is None:
        with pytest.raises(ValueError, match=micro):
            Config(exact=True, **settings)
    else:
        found = Config(exact=True, **settings)
        assert found.replica_sizes == sizes
        assert {found.microbatch_size(count) for count in sizes} == {micro}


def test_values_of_earlier_versions_are_read(tmp_path):
    """The mean image was called `picture`, in files and in checkpoints."""
    old = Config(mean="image").to_settings() | {"mean": "picture"}
    stored = json.loads(json.dumps(old))  # as a checkpoint holds it
    assert parse_settings(stored) == Config.from_settings(old) == Config(mean="image")
    path = tmp_path / "old.toml"
    path.write_text('mean = "picture"\n')
    assert load_settings(path) == {"mean": "image"}


LAYERS = """layers = [
  {name = "conv1", maps = 4, kernel = 5, stride = 2, then = ["relu", "pool"]},
  {name = "conv2", maps = 4, kernel = 5, reads = "both"},
  {name = "fc3", kind = "fc", reads = "both"},
]
"""


@pytest.fixture
def layers(tmp_path: Path):
    """Parse the preset four with a file of layers of the given text, with the given flags."""

    def of(text: str, *flags: str) -> Config:
        path = tmp_path / "net.toml"
        path.write_text(text, encoding="utf-8")
        words = ["four", "--layers", str(path), "--data", "d", "--run", "r", *flags]
        return parse_command(words).settings

    return of


@pytest.mark.filterwarnings("error")
def test_a_file_of_layers_is_the_network_and_the_config_all_else(layers, settings, tmp_path):
    found = layers("image_size = 32\nnorm = 'none'\n" + LAYERS, "--norm", "lcn")
    four = parse_command(["four", "--data", "d", "--run", "r"]).settings
    assert [row.name for row in found.design.rows()] == ["conv1", "conv2", "fc3"]
    assert found.design.columns == 2
    assert found.design.norm == "lcn"
    assert (found.lr, found.epochs, found.augment) == (four.lr, four.epochs, False)
    assert settings("image_size = 32\nnorm = 'lcn'\n" + LAYERS).design == found.design


def test_published_results_of_another_network_are_left_out(tmp_path):
    (tmp_path / "net.toml").write_text(LAYERS)
    words = ["dexp", "--data", "d", "--run", "r"]
    assert parse_command(words).settings.milestones
    found = parse_command([*words, "--layers", str(tmp_path / "net.toml")]).settings
    assert (found.milestones, found.lr_drop) == ((), 250.0)


def test_a_run_keeps_its_layers_when_the_file_has_gone(layers, tmp_path):
    found = layers(LAYERS)
    (tmp_path / "config.toml").write_text(format_toml(found, "0" * 64), encoding="utf-8")
    (tmp_path / "net.toml").unlink()
    assert read_run_config(tmp_path / "config.toml")[0] == found
    saved = json.loads(json.dumps(found.to_settings()))
    assert parse_settings(saved) == found
    assert '{name = "fc3", kind = "fc", reads = "both", then = []},' in format_toml(found, "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("width = 0.5", "net.toml has no table of layers; give it one, layers = [{name = …}, …]"),
        ("lr = 0.5\n" + LAYERS, "net.toml: lr is no setting of the network; give it in CONFIG"),
        ("layers = 3", "net.toml: layers is 3; it takes a list of tables"),
        (LAYERS.replace('"conv2"', '"conv2", input = "fc3"'),
         "net.toml: layers: conv2: input is 'fc3', a circle (conv2 <- fc3 <- conv2); let it read"),
        (LAYERS.replace("maps = 4, kernel = 5, reads", "maps = 4, kernel = 56, reads"),
         "layers: conv2: kernel is 56, and its input is 55x55 with pad 0; take a smaller kernel, "
         "or less pooling or stride before it (four, "),
        ("conv6 = true\n" + LAYERS, "conv6 is True; with layers it stays False (four, "),
    ],
)  # fmt: skip
def test_a_file_of_layers_that_cannot_work_is_refused_in_one_line(layers, text, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        layers(text)
    assert "net.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_survive_the_line_of_the_command_and_the_file_of_a_run(settings, tmp_path):
    rows = LAYERS.replace("kernel = 5, stride", 'pool = "2/2", bias = 1.5e-3, kernel = 5, stride')
    found = settings(rows, "--width", "0.5")
    assert tomllib.loads(format_toml(found, ""))["layers"][0] == {
        "name": "conv1", "maps": 4, "kernel": 5, "stride": 2, "reads": "picture", "bias": 0.0015,
        "then": ["relu", "pool"], "pool": "2/2",
    }  # fmt: skip
