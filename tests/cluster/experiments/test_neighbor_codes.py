"""Codes: Hamming search against unpacked bits, the table against brute force, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cluster.config import Config
from cluster.experiments.neighbors import codes
from cluster.experiments.neighbors.coders import (
    AutoEncoderConfig,
    draw_sample,
    fit_itq,
    fit_pca,
    train_autoencoder,
)
from cluster.experiments.neighbors.codes import compute_recall, main
from cluster.experiments.neighbors.features import (
    BLOCK_ROWS,
    FeatureInfo,
    Features,
    compute_crc32,
    seal_features,
)
from cluster.experiments.neighbors.search import HammingIndex
from cluster.run.folder import write_run_config
from pipeline.tools.errors import DataError, UsageError

UNITS = 64
CLASSES = 5


def clustered(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as a network might have them, float16 [n, units], and their classes."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(12, UNITS))
    centres = rng.normal(size=(CLASSES, 12)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    rows = (centres[labels] + rng.normal(size=(count, 12))) @ directions
    return np.maximum(rows, 0).astype(np.float16), labels


def put(folder: Path, split: str, count: int, seed: int, checkpoint: str = "ab") -> Features:
    rows, labels = clustered(count, seed)
    about = FeatureInfo(
        split=split,
        samples=count,
        units=UNITS,
        dtype="float16",
        classes=tuple("abcde"),
        data_sha256="cd",
        step=7,
        checkpoint="step-00000007",
        checkpoint_sha256=checkpoint,
    )
    folder.mkdir(exist_ok=True)
    np.save(folder / f"features-{split}.npy", rows)
    sound = np.ones(count, bool)
    sound[3] = False
    crc = [compute_crc32(rows[start : start + BLOCK_ROWS]) for start in range(0, count, BLOCK_ROWS)]
    seal_features(folder, about, labels, sound, crc)
    return Features(folder, split)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with features, but no longer the checkpoint that they were made with."""
    write_run_config(tmp_path, Config(), "cd", samples=900, step=0)
    put(tmp_path / "neighbours", "train", 900, 1)
    put(tmp_path / "neighbours", "val", 80, 2)
    return tmp_path


def called(run: Path, capsys, *more: str):
    words = [str(run), "--bits", "16", "32", "--steps", "150", "--hidden", "48", "--json", *more]
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("bits", [8, 24, 64, 72, 128, 256, 512])
def test_hamming_neighbours_are_those_of_unpacked_bits(bits):
    rng = np.random.default_rng(bits)
    base, queries = rng.random((400, bits)) < 0.3, rng.random((21, bits)) < 0.3
    base[200:] = base[:200]  # ties
    packed, asked = (np.packbits(part, axis=1) for part in (base, queries))
    ids, far = HammingIndex(packed).find_nearest(asked, 30)
    expected = (base[None] != queries[:, None]).sum(2)
    order = np.argsort(expected, axis=1, kind="stable")[:, :30]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(far, np.take_along_axis(expected, order, 1))


def test_all_codes_can_be_asked_for():
    eye = np.packbits(np.eye(16, dtype=bool), axis=1)
    ids, far = HammingIndex(eye).find_nearest(eye[2:3], 16)
    assert sorted(ids[0].tolist()) == list(range(16))
    assert far[0].tolist() == [0] + [2] * 15


def test_the_table_is_what_brute_force_counts(run, capsys):
    facts = called(run, capsys, "-k", "5")["codes"]
    asked, base = (Features(run / "neighbours", split) for split in ("val", "train"))
    queries = np.delete(np.arange(80), 3)  # the damaged one
    far = np.square(asked.values[queries][:, None].astype(np.float64) - base.values).sum(-1)
    far[:, 3] = np.inf
    exact = np.argsort(far, axis=1, kind="stable")[:, :5]
    rows = {(row["method"], row["bits"]): row for row in facts["rows"]}
    assert rows["exact", 16 * UNITS]["precision_at_k"] == pytest.approx(
        (base.labels[exact] == asked.labels[queries][:, None]).mean()
    )
    with safe_open(run / "neighbours" / "codes-32.safetensors", framework="np") as file:
        codes = file.get_tensor("codes")
        net = {name[4:]: file.get_tensor(name) for name in file.keys()  # noqa: SIM118
               if name.startswith("net/")}  # fmt: skip
    assert codes.shape == (900, 4)

    def bits(rows):  # the encoder once more, by hand
        x = (rows.astype(np.float64) - net["mean"]) / net["scale"]
        hidden = np.maximum(x @ net["into.weight"].T + net["into.bias"], 0)
        logits = x @ net["straight.weight"].T + hidden @ net["code.weight"].T + net["code.bias"]
        return logits > net["level.running_mean"]

    assert (np.unpackbits(codes, axis=1) == bits(base.values)).mean() > 0.999
    differ = np.unpackbits(codes, axis=1)[None] != bits(asked.values[queries])[:, None]
    apart = differ.sum(2)
    apart[:, 3] = 99
    found = np.argsort(apart, axis=1, kind="stable")
    for count, name in ((5, "recall_at_k"), (100, "recall_in_shortlist")):
        hits = [len(set(e) & set(f)) / 5 for e, f in zip(exact, found[:, :count], strict=True)]
        assert rows["auto-encoder", 32][name] == pytest.approx(np.mean(hits), abs=0.01)
    assert rows["auto-encoder", 32]["bytes"] == 4


def test_codes_find_what_chance_does_not_and_longer_ones_find_more(run, capsys):
    rows = called(run, capsys)["codes"]["rows"]
    by = {(row["method"], row["bits"]): row for row in rows if "recall_at_k" in row}
    for method in ("signs of PCA", "ITQ", "auto-encoder"):
        assert by[method, 32]["recall_at_k"] > 0.15  # chance: 10 of 899
        assert by[method, 32]["recall_in_shortlist"] > by[method, 32]["recall_at_k"]
    assert by["auto-encoder", 32]["recall_at_k"] > by["auto-encoder", 16]["recall_at_k"]
    assert by["auto-encoder", 32]["precision_at_k"] > 0.4  # chance: one in five


def test_training_brings_the_features_back_better_and_the_same_each_time():
    rows, _ = clustered(900, 1)
    sound = np.ones(900, bool)
    x = draw_sample(rows, sound, 0)
    start = fit_itq(x, fit_pca(x, 16, 0), 0)
    errors, states = [], []
    for steps in (1, 200, 200):
        net = train_autoencoder(
            rows,
            sound,
            start,
            AutoEncoderConfig(bits=16, hidden=48, steps=steps, lr=1e-3),
            lambda _: None,
        )
        errors.append(float(net(x).detach()))
        states.append(net.state_dict())
    assert errors[1] < 0.5 * errors[0]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])


def test_turning_loses_less_than_not_turning():
    x = torch.from_numpy(clustered(900, 1)[0].astype(np.float32))
    plain = fit_pca(x, 12, 0)
    centred = (x - x.mean(0)).double().numpy()
    exact = np.linalg.svd(centred, full_matrices=False)[2][:12].T
    np.testing.assert_allclose(np.abs((exact * plain.axes.numpy()).sum(0)), 1, atol=1e-3)
    losses = []
    for code in (plain, fit_itq(x, plain, 0)):
        v = (x - code.mean) @ code.axes
        losses.append(float((v / v.std() - v.sign()).square().mean()))
        np.testing.assert_allclose(code.axes.T @ code.axes, np.eye(12), atol=1e-4)
    assert losses[1] < losses[0]


def test_a_length_that_is_there_is_not_trained_again(run, capsys, monkeypatch):
    first = called(run, capsys)["codes"]["rows"]
    monkeypatch.setattr("cluster.experiments.neighbors.codes.train_autoencoder", None)
    second = called(run, capsys)["codes"]["rows"]
    keys = ("method", "bits", "recall_at_k", "precision_at_k")
    assert [[r.get(key) for key in keys] for r in second] == [
        [r.get(key) for key in keys] for r in first
    ]
    with pytest.raises(TypeError):  # other settings: trained again
        main([str(run), "--bits", "16", "--steps", "3"])


def test_an_image_is_not_its_own_find(run, capsys):
    rows = called(run, capsys, "--queries", "train", "--asked", "50", "-k", "1")["codes"]["rows"]
    assert all(row["recall_at_k"] < 1 for row in rows[1:] if "recall_at_k" in row)


def test_the_parts_of_the_summary_keep_each_other(run, capsys):
    path = run / "neighbours" / "summary.json"
    head = called(run, capsys)
    path.write_text(json.dumps(head | {"neighbours": {"auc": 0.5}}))
    assert called(run, capsys)["neighbours"] == {"auc": 0.5}
    path.write_text(json.dumps(head | {"neighbours": {"auc": 0.5}, "step": 6}))
    assert "neighbours" not in called(run, capsys)


def test_without_faiss_the_table_says_so(run, capsys, monkeypatch):
    monkeypatch.setattr(codes, "load_faiss", lambda: None)
    assert main([str(run), "--bits", "16", "--steps", "3"]) == 0
    assert "not measured: faiss is not installed" in capsys.readouterr().out


def test_product_quantisation_finds_more_than_signs(run, capsys):
    pytest.importorskip("faiss")
    rows = called(run, capsys)["codes"]["rows"]
    by = {row["method"]: row for row in rows if row["bits"] == 32}
    found = by["product quantisation"]["recall_at_k"]
    assert by["signs of PCA"]["recall_at_k"] < found < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-k", "101"], "--k 101 is out of range; give 1 to 100"),
        (["-k", "0"], "--k 0 is out of range; give 1 to 100"),
        (["--bits", "12"], "--bits 12: give multiples of 8 up to 64"),
        (["--bits", "128"], "--bits 128: give multiples of 8 up to 64"),
        (["--steps", "0"], "--steps 0 is out of range"),
    ],
)
def test_what_cannot_be_is_refused(run, words, said):
    with pytest.raises(UsageError, match=said):
        main([str(run), *words])


def test_features_that_do_not_go_together_are_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"no features .*features-test\.json; make them with"):
        main([str(run), "--base", "test"])
    put(run / "neighbours", "val", 80, 2, checkpoint="another")
    with pytest.raises(DataError, match="not of one run"):
        main([str(run)])
    shutil.rmtree(run / "neighbours")
    with pytest.raises(UsageError, match="there are no features in"):
        main([str(run)])
    with pytest.raises(UsageError, match="holds no run"):
        main([str(tmp_path / "elsewhere")])


def test_features_of_another_run_are_refused(run):
    there = run / "checkpoints" / "step-00000007"
    there.mkdir(parents=True)
    files = {f"column-{column}.safetensors": {"bytes": 1, "sha256": "0"} for column in "ab"}
    table = {"version": 1, "step": 7, "position": 0, "classes": [], "files": files}
    (there / "checkpoint.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match="are of another run than"):
        main([str(run)])


def test_recall_counts_the_exact_ones_found():
    exact, found = np.array([[1, 2], [3, 4]]), np.array([[2, 9, 1], [8, 9, 4]])
    assert compute_recall(exact, found) == 0.75
