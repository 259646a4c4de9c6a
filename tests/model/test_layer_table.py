"""Tables of layers of one's own: what a row may say, and that the network is what it says."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.architecture import Design, build_stages
from model.column_threads import ColumnThreads
from model.layer_table import NAME, RESERVED, TABLES, Layer, format_layer, parse_layers
from model.summary import build_table, compute_receptive_fields

# A tour of what a table can say: columns that cross at conv3 and fc5, a second look at the image
# that is added to conv4 (the release's blurred picture), windows and dropout of single layers.
TOUR = tomllib.loads("""
layers = [
  {name = "conv1", maps = 6, kernel = 7, stride = 2, edge = 2, then = ["norm", "pool", "relu"]},
  {name = "conv2", maps = 8, kernel = 5, pad = 2, then = ["sigmoid", "mean_pool"], pool = "2/2"},
  {name = "conv3", maps = 8, kernel = 3, pad = 1, reads = "both", bias = 0.5},
  {name = "low1", maps = 8, kernel = 5, stride = 2, pad = 2, reads = "picture", shrink = 8, then = [
    ]},
  {name = "conv4", maps = 8, kernel = 3, stride = 2, pad = 1, input = "conv3", adds = [
    "low1"], then = ["tanh", "dropout"]},
  {name = "local5", maps = 4, kernel = 3, pad = 1, kind = "local"},
  {name = "fc5", maps = 10, kind = "fc", reads = "both", then = ["relu", "dropout"]},
  {name = "fc6", maps = 8, kind = "fc"},
  {name = "fc7", kind = "fc", reads = "both"},
]
""")["layers"]  # fmt: skip
SIDE = 224


def design(tables: list[dict[str, Any]], **settings: Any) -> Design:
    return Design.from_settings({"layers": tables} | settings)


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 60


def tour_written_out(net: AlexNet, x: Tensor) -> Tensor:
    """The network of `TOUR` in plain torch, column by column."""
    w = net.column_state()

    def conv(name: str, x: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, pad)

    def fc(name: str, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), w[f"{name}.weight"], w[f"{name}.bias"])

    norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
    second = []
    for c in "ab":
        y = F.relu(
            F.max_pool2d(norm(conv(f"{c}.conv1", F.pad(x, (0, 2, 0, 2)), 2)), 3, 2, 0, 1, True)
        )
        y = torch.sigmoid(conv(f"{c}.conv2", y, pad=2))
        second.append(F.avg_pool2d(y, 2, 2, ceil_mode=True))
    fourth = []
    for c in "ab":
        y = F.relu(conv(f"{c}.conv3", torch.cat(second, 1), pad=1))
        low = conv(f"{c}.low1", F.avg_pool2d(x, 8), 2, 2)
        y = 0.5 * torch.tanh(conv(f"{c}.conv4", y, 2, 1) + low)
        patches = F.unfold(y, 3, padding=1).unflatten(2, y.shape[2:])
        filters = w[f"{c}.local5.weight"].flatten(1, 3)
        fourth.append(
            F.relu(torch.einsum("bihw,oihw->bohw", patches, filters) + w[f"{c}.local5.bias"])
        )
    fifth = [0.5 * F.relu(fc(f"{c}.fc5", torch.cat(fourth, 1))) for c in "ab"]
    sixth = torch.cat([F.relu(fc(f"{c}.fc6", fifth["ab".index(c)])) for c in "ab"], 1)
    return torch.cat([fc(f"{c}.fc7", sixth) for c in "ab"], 1)[:, : net.classes]


def test_a_network_of_a_table_is_that_network_written_out() -> None:
    net = AlexNet(classes=7, design=design(TOUR), seed=1).double().eval()
    with torch.no_grad():
        for key, value in net.named_parameters():
            value.mul_(20).add_(0.05 if key.endswith("bias") else 0)  # so that all is something
        found, wanted = net(images()), tour_written_out(net, images())
    assert wanted.std(0).min() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_in_float32_within_rounding() -> None:
    net = AlexNet(classes=7, design=design(TOUR), seed=1).eval()
    x = images().float()
    with torch.no_grad():
        torch.testing.assert_close(net(x), tour_written_out(net, x), rtol=0, atol=1e-5)


def test_columns_by_themselves_compute_the_whole() -> None:
    """Also the dropout masks of a convolution, and gradients through the layer that is added."""
    results = []
    for is_cut in (False, True):
        net = AlexNet(classes=6, design=design(TOUR), seed=1).double()
        net.set_position(5)
        if is_cut:
            columns = ColumnThreads(net)
            logits, _ = columns.run(lambda column: _learn(column))
            columns.close()
            gradients = {
                f"{'ab'[i]}.{key}": value.grad
                for i, one in enumerate(columns.columns)
                for key, value in one.named_parameters()
            }
        else:
            logits = _learn(net)
            gradients = net.split(
                {k: v.grad for k, v in net.named_parameters() if v.grad is not None}
            )
        results.append((logits, gradients))
    (whole, wanted), (cut, found) = results
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-15)


def _learn(net: AlexNet) -> Tensor:
    logits = net(images())
    F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    return logits.detach()


@pytest.mark.parametrize("name", TABLES)
def test_each_table_that_duet_has_is_the_same_network_as_a_file(name: str) -> None:
    tables = [format_layer(row) for row in TABLES[name]]
    assert parse_layers(tables) == TABLES[name]
    own, theirs = design(tables), Design(net=name)
    assert own.rows() == theirs.rows()
    assert build_stages(7, own) == build_stages(7, theirs)


def test_a_table_is_as_it_is_written_with_one_column_too() -> None:
    stages = build_stages(10, design(TOUR, columns=1))
    assert [stage.outputs for stage in stages] == [6, 8, 8, 8, 8, 4, 10, 8, 10]
    assert {stage.layer.reads for stage in stages} == {"own", "picture"}
    assert AlexNet(classes=10, design=design(TOUR, columns=1)).eval()(images(1).float()).shape == (
        1,
        10,
    )


def test_the_first_layer_may_be_fully_connected() -> None:
    rows = [{"name": "fc1", "maps": 3, "kind": "fc"}, {"name": "fc2", "kind": "fc"}]
    net = AlexNet(classes=4, design=design(rows, image_size=32)).eval()
    x = images(2).float()[:, :, :32, :32]
    w = net.state_dict()
    hidden = F.relu(F.linear(x.flatten(1), w["fc1.weight"], w["fc1.bias"])).chunk(2, 1)
    logits = [
        F.linear(hidden[i], w["fc2.weight"].chunk(2)[i], w["fc2.bias"].chunk(2)[i]) for i in (0, 1)
    ]
    torch.testing.assert_close(net(x), torch.cat(logits, 1))


def test_the_summary_follows_the_rows() -> None:
    one = design(TOUR)
    stages = build_stages(10, one)
    assert [stage.final_size for stage in stages] == [55, 28, 28, 14, 14, 14, 1, 1, 1]
    fields = dict(
        zip((s.layer.name for s in stages), compute_receptive_fields(stages, one), strict=True)
    )
    assert fields["low1"] == 8 + 4 * 8
    assert fields["conv4"] == max(fields["low1"], 7 + 2 * 2 + 4 * 4 + 4 + 2 * 8 + 2 * 8)
    for row in build_table(10, one):
        if row.layer in ("conv2", "low1", "conv4", "fc6"):
            assert row.crosses_forward == 0
    sums = {row.layer: row.parameters for row in build_table(10, one) if row.column == "a"}
    net = AlexNet(columns=(0, 1), classes=10, design=one)
    counts = dict.fromkeys(sums, 0)
    for key, value in net.named_parameters():
        counts[key.split(".")[0]] += value.numel()
    assert counts == {name: 2 * count for name, count in sums.items()}


def changed(layer: str, **fields: Any) -> list[dict[str, Any]]:
    return [row | fields if row["name"] == layer else row for row in TOUR]


WRONG = {
    "layers has 1 rows; it takes from 2 to 100": [TOUR[-1]],
    "row 2 is 7; it takes a table, {name = …}": [TOUR[0], 7, TOUR[-1]],
    "the name of row 2 is None; it takes letters and a number": changed("conv2", name=None),
    "is 'bfloat16'; it takes": changed("conv2", name="bfloat16"),
    "two rows are called 'conv1'; give each its own name": changed("conv2", name="conv1"),
    "conv2: kind is 'convolution'; it takes 'conv' or 'local' or 'fc'": changed(
        "conv2", kind="convolution"
    ),
    "conv2 has 'filters'; a row takes name, maps, kernel, kind": changed("conv2", filters=8),
    "conv2: maps is '8'; it takes a whole number": changed("conv2", maps="8"),
    "conv2: maps is True; it takes a whole number": changed("conv2", maps=True),
    "conv2: maps is 0; it is from 1 to 100000": changed("conv2", maps=0),
    "fc7: maps is 10; it is left out in the last row": changed("fc7", maps=10),
    "fc7: then is ['relu']; it is left out in the last row": changed("fc7", then=["relu"]),
    "conv2: then is ['elu']; it takes relu, tanh, sigmoid, norm": changed("conv2", then=["elu"]),
    "conv2: then is ['dropout', 'relu']; it has dropout at its end": changed(
        "conv2", then=["dropout", "relu"], pool=""
    ),
    "fc6: then is ['pool']; it has, after an fc layer, only an": changed("fc6", then=["pool"]),
    "fc6: kernel is 3; it goes with kind = 'conv' or 'local'": changed("fc6", kernel=3),
    "conv2: kernel is 0; it is from 1 to 100000": changed("conv2", kernel=0),
    "conv2: pad is 5; it is from 0 up, and below kernel": changed("conv2", pad=5),
    "local5: reads is 'both'; it is 'own' in a local layer": changed("local5", reads="both"),
    "local5: pad is 0; it is 1, for the size to stay": changed("local5", pad=0),
    "conv2: edge is 2; it goes with the picture, pad = 0": changed("conv2", edge=2),
    "conv1: edge is 7; it is from 0 up, and below kernel": changed("conv1", edge=7),
    "low1: shrink is 225, and the image is 224x224; take smaller": changed("low1", shrink=225),
    f"conv1: bias is 1{'0' * 39}": changed("conv1", bias=10**400),
    "conv1: bias is -1e+39; it is a number from -100000 to 100000": changed("conv1", bias=-1e39),
    "conv1: bias is nan; it is a number": changed("conv1", bias=float("nan")),
    "conv1: deviation is 1e+39; it is a number from 0 to 100000": changed("conv1", deviation=1e39),
    "conv4: adds is ''; the layers before it are conv1": changed("conv4", adds=[""]),
    "fc7: adds is ['fc6']; it is left out in the last row, as long": changed("fc7", adds=["fc6"]),
    "conv2: shrink is 2; it goes with the picture": changed("conv2", shrink=2),
    'conv2: pool is \'2/3\'; it takes "SIDE/STRIDE"': changed("conv2", pool="2/3"),
    "conv3: pool is '2/2'; it goes with pool or mean_pool in then": changed("conv3", pool="2/2"),
    "conv1: reads is 'own'; the first row reads the 'picture'": changed(
        "conv1", reads="own", edge=0
    ),
    "low1: input is 'conv1'; it goes with reads = 'own' or 'both'": changed("low1", input="conv1"),
    "conv4: input is 'conv9'; the layers before it are conv1, conv2, conv3, low1": changed(
        "conv4", input="conv9"
    ),
    "conv2: input is 'conv3', a circle (conv2 <- conv3 <- conv2); let it read one of an": changed(
        "conv2", input="conv3"
    ),
    "conv3: adds is 'conv3', a circle (conv3 <- conv3)": changed("conv3", adds=["conv3"]),
    "conv3: input is 'low1', a later row; name one of an earlier row": changed(
        "conv3", input="low1"
    ),
    "local5 is read by no layer; leave it out, or name it": changed("fc5", input="conv4"),
    "conv9: kind is 'conv'; it reads fc6, which has units, no maps": [
        *TOUR[:-1],
        {"name": "conv9", "maps": 4, "kernel": 1},
        TOUR[-1],
    ],
    "fc5: kernel is 3": changed("fc5", kernel=3),
    "conv4: adds low1, which has 4 maps of 14x14, and conv4 itself 8 maps of 14x14": changed(
        "low1", maps=4
    ),
    "conv4: adds low1, which has 8 maps of 28x28, and conv4 itself 8 maps of 14x14": changed(
        "low1", stride=1
    ),
    "conv1: kernel is 300, and its input is 224x224 with pad 0; take a smaller": changed(
        "conv1", kernel=300
    ),
    "conv2: pool is 99/2, and its maps are 55x55; take smaller windows": changed(
        "conv2", pool="99/2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_a_table_that_cannot_work_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        design(WRONG[words])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("layers")


def test_settings_of_the_papers_network_stay_with_it() -> None:
    with pytest.raises(ValueError, match="conv6 is True; with layers it stays False"):
        design(TOUR, conv6=True)
    with pytest.raises(ValueError, match="net is 'four'; with layers it stays 'paper'"):
        design(TOUR, net="four")


def test_settings_of_norm_activation_and_dropout_reach_the_rows() -> None:
    rows = design(TOUR, norm="batch", activation="tanh", dropout=False).rows()
    assert rows[0].then == ("batch_norm", "pool", "tanh")
    assert rows[4].then == ("tanh",)
    assert design(TOUR, norm="batch").has_batch_norm
    assert design(changed("conv2", then=["batch_norm", "mean_pool"])).has_batch_norm
    assert not design(TOUR, lrn_across=True).is_cut_by_columns
    with pytest.raises(ValueError, match="layers: conv1: then has batch_norm, and so has the"):
        design(changed("conv1", then=["batch_norm", "norm"]), norm="batch")


@pytest.mark.parametrize(
    ("then", "settings", "wanted"),
    [
        (["scale", "relu", "pool"], {}, ("relu", "pool", "scale")),
        (["scale", "sigmoid", "pool"], {}, ("scale", "sigmoid", "pool")),
        (["scale", "relu", "pool"], {"activation": "tanh"}, ("scale", "tanh", "pool")),
        (["pool", "sigmoid", "scale"], {}, ("pool", "sigmoid", "scale")),
        (["pool", "relu", "dropout"], {"norm_layers": ["conv1=lcn"]},
         ("pool", "relu", "lcn", "dropout")),
        (["pool", "dropout"], {"norm_layers": ["conv1=lrn"]}, ("norm", "pool", "dropout")),
    ],
)  # fmt: skip
def test_an_operation_moves_only_past_those_that_give_the_same_behind_it(
    then: list[str], settings: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    assert design(changed("conv1", then=then), **settings).rows()[0].then == wanted


def test_names_in_a_table_are_no_names_that_a_module_has() -> None:
    taken = {
        name for name in {*dir(nn.Module), *vars(AlexNet(width=1 / 16))} if NAME.fullmatch(name)
    }
    assert taken <= {*RESERVED, *(row.name for row in TABLES["paper"])}
    assert set(RESERVED) <= taken


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=3),
    st.sampled_from(["conv", "fc", "local", "own", "both", "picture", "conv1", "conv3", "3/2"]),
    st.lists(st.sampled_from(["relu", "pool", "norm", "dropout", "conv1", "fc5", ""]), max_size=3),
)  # fmt: skip


fields = st.sampled_from([*vars(TABLES["paper"][0]), "x"])


@given(
    st.lists(st.tuples(st.integers(0, 8), fields, values), max_size=4),
    st.permutations(range(9)) | st.just(range(9)),
)
def test_a_damaged_table_is_refused_in_one_line_or_makes_a_network(damage: Any, order: Any) -> None:
    tables = [dict(TOUR[index]) for index in order]
    for row, key, value in damage:
        tables[row][key] = value
    said = ""
    try:
        one = design(tables)
    except ValueError as error:
        said = str(error)
    if said:
        assert re.fullmatch("layers.+", said)
    else:
        assert design([format_layer(row) for row in one.layers]) == one
        assert all(row.parameters > 0 for row in build_table(10, one))


def test_a_layer_of_python_is_checked_like_one_of_a_file() -> None:
    rows = (*TABLES["paper"][:1], replace(TABLES["paper"][1], input="conv7"), *TABLES["paper"][2:])
    with pytest.raises(ValueError, match="conv2: input is 'conv7'"):
        Design(layers=rows)
    assert Design(layers=TABLES["paper"]).rows()[2] == Layer(
        "conv3", 192, 3, pad=1, reads="both", deviation=0.03
    )
