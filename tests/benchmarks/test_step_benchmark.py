"""`benchmarks/step.py` and `benchmarks/gpu/step.py`: the network they compare with, what they make
of what they measure, and a small run of each.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from model.alexnet import AlexNet
from model.norm import native

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / "gpu"), str(BENCHMARKS)]

from nets import duet_step, plain_alexnet  # noqa: E402
from parts import step_table  # noqa: E402

from tests.helpers.op_graph import OperationGraph  # noqa: E402
from tests.helpers.processes import run_command  # noqa: E402


def script(path: str) -> ModuleType:
    """An entry point, under a name that is not that of another module."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / path), *arguments]
    return run_command(command, check=True)


def test_the_plain_network_is_the_same_network() -> None:
    assert sum(p.numel() for p in AlexNet().parameters()) == 60_965_224
    with torch.device("meta"):
        assert sum(p.numel() for p in plain_alexnet().parameters()) == 60_965_224
    ours, plain = AlexNet(width=0.25, classes=10).eval(), plain_alexnet(10, 0.25).eval()
    layers = [m for m in plain if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for theirs, (name, own) in zip(layers, ours.named_children(), strict=True):
            # torch's dropout doubles what is left in training, the paper's halves all in testing.
            factor = 0.5 if name in ("fc7", "fc8") else 1.0
            theirs.weight.copy_(factor * own.get_parameter("weight"))
            assert theirs.bias is not None
            theirs.bias.copy_(own.get_parameter("bias"))
        images = 60 * torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(plain(images), ours(images), rtol=1e-4, atol=1e-4)


def test_our_step_is_the_trainers_and_replays_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(OperationGraph):
        def capture(self, work: Any) -> Any:
            raise RuntimeError("no graphs here")

    # An `OperationGraph` sees torch's operations alone.
    monkeypatch.setattr(native, "prepare_kernels", lambda x: False)
    images, labels = 60 * torch.randn(2, 3, 224, 224), torch.tensor([1, 2])
    width, replays = {"width": 1 / 32, "classes": 4}, OperationGraph.replays
    nets = [AlexNet(**width), AlexNet(**width)]
    for net, graph in zip(nets, (None, OperationGraph), strict=True):
        step = duet_step(net, graph=graph)
        for number in range(2):
            step(number, images, labels, torch.float32)
    assert OperationGraph.replays - replays == 2 * 2  # both passes of two steps
    moved, still = nets[0].state_dict(), AlexNet(**width).state_dict()
    for key, value in nets[1].state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(moved[key], still[key]) for key in moved if "fc8" in key)
    step = duet_step(nets[0], graph=Refused)
    with pytest.raises(RuntimeError, match="no graphs here"):
        step(0, images, labels, torch.float32)


def test_ratios_are_taken_within_rounds() -> None:
    step = script("step.py")
    rates = {
        "duet": {"float32": [10.0, 20.0, 40.0], "bfloat16": [100.0, 200.0, 400.0]},
        "duet without LRN": {"float32": [20.0, 40.0, 80.0], "bfloat16": [125.0, 250.0, 500.0]},
        "plain": {"float32": [50.0, 50.0, 50.0], "bfloat16": [25.0, 40.0, 80.0]},
    }
    shares = {"aten::mm": 0.5, "NormKernel": 0.1, "NormKernelBackward": 0.2, "other": 0.2}
    found = step.summarize(rates, {"float32": shares, "bfloat16": shares})
    assert found["best"] == {"duet": "bfloat16", "duet without LRN": "bfloat16", "plain": "float32"}
    assert found["ratio_in_best"]["plain"] == 4.0
    assert found["ratio"]["plain"] == {"float32": 0.4, "bfloat16": 5.0}
    assert found["lrn_share"]["float32"] == pytest.approx(0.5)
    assert found["lrn_share"]["bfloat16"] == pytest.approx(0.2)
    assert found["passes_share"]["float32"] == pytest.approx(0.3)


@pytest.mark.slow
def test_a_small_run_measures_every_lane() -> None:
    options = "--width 0.03125 --batch-size 2 --rounds 1 --steps 1 --json"
    done = run("step.py", *options.split())
    found = json.loads(done.stdout)
    lanes = {"duet", "duet without LRN", "plain", "plain, memory"}
    assert lanes <= found["img_s"].keys() <= lanes | {"torchvision"}
    assert found["img_s"].keys() | found["missing"].keys() == lanes | {"torchvision"}
    for types in found["img_s"].values():
        assert types.keys() == {"float32", "bfloat16"}
        assert all(len(values) == 1 and values[0] > 0 for values in types.values())
    # The names by which the profiler knows our passes are still theirs.
    assert all(0 < share < 1 for share in found["passes_share"].values())
    assert "LRN in our step, bfloat16" in done.stderr


def gpu_found(**more: Any) -> dict[str, Any]:
    """Return results such as `gpu/step.py` has on some GPU."""
    lanes = {
        "duet bf16 compiled": {"net": "duet", "mode": "bf16", "form": "compiled"},
        "plain tf32 eager": {"net": "plain", "mode": "tf32", "form": "eager"},
        "plain bf16 compiled": {"net": "plain", "mode": "bf16", "form": "compiled"},
    }
    rates = ([4e4, 5e4, 6e4], [1e4, 1e4, 1e4], [9e4, 9e4, 9e4])
    for row, rate in zip(lanes.values(), rates, strict=True):
        row |= {"img_s": rate, "warm_up_s": 1.0}
    return {
        "command": "python",
        "machine": {"gpu": "some GPU", "cpu": "some CPU", "date": "today"},
        "finished": True,
        "setup": {"batch": 128, "width": 1.0},
        "limits": {"bf16_tflops": 700.0},
        "steps": lanes,
    } | more


def test_goals_are_judged_on_a_gpu_by_the_eager_plain_network() -> None:
    times, share = step_table.goals(gpu_found())
    assert times["met"]
    assert times["found"] == 5.0
    assert share["found"] == pytest.approx(5e4 * 6 * 724_406_816 / 700e12)
    assert share["met"]
    times, share = step_table.goals(gpu_found(setup={"batch": 1024, "width": 1.0}))
    assert times["met"]
    assert share["goal"] == "45% of the bf16 matrix limit"
    assert share["met"] is False
    assert len(step_table.goals(gpu_found(setup={"batch": 96, "width": 1.0}))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {"cpu": "some CPU"}},
        {"setup": {"batch": 128, "width": 0.5}},
        {"steps": {}, "limits": {}},
    ],
)
def test_a_goal_that_was_not_measured_is_neither_met_nor_missed(change) -> None:
    rows = step_table.goals(gpu_found(**change))
    assert [(row["found"], row["met"]) for row in rows] == [(None, None), (None, None)]
    page = step_table.markdown(gpu_found(goals=rows))
    assert "| 3 times plain eager PyTorch |  | not measured |" in page


def test_the_page_tells_what_is_missing() -> None:
    found = gpu_found(finished=False)
    found["steps"]["duet fp32 eager"] = {
        "net": "duet", "mode": "fp32", "form": "eager", "failed": "OutOfMemoryError: so"
    }  # fmt: skip
    page = step_table.markdown(found)
    assert "**Cut off" in page
    assert "| duet bf16 compiled | 50,000 | 40,000 60,000 | 5.00 | 31.0% | 1.0 |" in page
    assert "| duet fp32 eager | OutOfMemoryError: so |" in page
    assert "Launches of a step" not in page


def test_one_line_tells_the_fastest_lane_of_each_form() -> None:
    found = gpu_found()
    found["steps"] |= {
        "duet bf16 graph": {"net": "duet", "mode": "bf16", "form": "graph", "failed": "no graph"},
        "duet tf32 fused": {"net": "duet", "mode": "tf32", "form": "fused", "img_s": [2e4] * 3},
        "duet fp32 fused": {"net": "duet", "mode": "fp32", "form": "fused", "img_s": [1e4] * 3},
    }
    assert step_table.figure(found) == (
        "duet tf32 fused 20,000 img/s, duet bf16 compiled 50,000 img/s, plain tf32 eager "
        "10,000 img/s, duet bf16 graph: no graph, 31.0% of the bf16 limit, 5.00 times plain eager"
    )


@pytest.mark.slow
def test_a_small_run_on_the_cpu_leaves_its_results(tmp_path: Path) -> None:
    options = "--device cpu --width 0.03125 --batch 2 --rounds 1 --seconds 0.01 --matrix 64"
    done = run("gpu/step.py", *options.split(), "--skip", "compiled", "--out", str(tmp_path))
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["finished"]
    assert found["limits"].keys() == {"fp32_tflops", "tf32_tflops", "bf16_tflops", "copy_gb_s"}
    # There are no graphs and no tf32 on a CPU.
    assert list(found["steps"]) == [
        f"{net} {mode} {form}"
        for mode in ("bf16", "fp32")
        for net, form in (("duet", "fused"), ("plain", "eager"))
    ]
    assert all(row["img_s"][0] > 0 for row in found["steps"].values())
    ours = [row for row in found["norm"] if row["form"] == found["machine"]["norm"]]
    assert [row["error"] < 2**-7 for row in ours] == [True, True]
    (profile,) = found["profile"]
    assert profile["launches"] > 50
    assert any(row["operation"] == "NormKernelBackward" for row in profile["top"])
    assert [row["met"] for row in found["goals"]] == [None]  # a CPU proves nothing
    assert path.with_suffix(".md").read_text() in done.stderr


def test_no_gpu_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(BENCHMARKS / "gpu/step.py"), "--out", str(tmp_path)]
    done = run_command(command)
    assert done.returncode == 3
    assert done.stderr == "error: torch sees no GPU; --device cpu tries the script out\n"
