"""Answers of nvidia-smi: rows of one GPU, and what it does not tell."""

from __future__ import annotations

from pipeline.throughput.nvidia_smi import find_watts, parse_smi


def test_a_gpus_power_is_found_among_others_or_told_by_none():
    text = "GPU-ab, 312.45 W\nGPU-cd, [N/A]\nGPU-ef, [Not Supported]\nGPU-01, 71 W\n"
    text += "GPU-02, [Unknown Error]\n"
    found = [find_watts(parse_smi(text), uuid) for uuid in ("ab", "cd", "ef", "01", "02", "no", "")]
    assert found == [312.45, None, None, 71.0, None, None, None]
    failure = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    assert find_watts(parse_smi(failure), "ab") is None
