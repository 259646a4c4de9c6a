"""`python -m pipeline.verify DATA --ledger RUN`."""

from __future__ import annotations

import json
import sys
from unittest import mock

import pytest

from pipeline import verify
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.ledgers import attempt, ledgers, sixty, three_attempts  # noqa: F401 - fixtures
from tests.helpers.processes import drop_progress


def command(*arguments: object) -> int | None:
    with mock.patch.object(sys, "argv", ["verify", *map(str, arguments)]):
        return verify.main()


def test_the_command_proves_or_names(run, data, capsys):
    assert command(data, "--ledger", run, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sound"] is True
    assert json.loads(out)["epochs"] == [0, 1, 2, 3]
    assert drop_progress(err).startswith(
        "epochs 0-3 exactly once (4 x 60 samples), epoch 4 to 18; 3 attempts"
    )
    ledgers(run)[3].unlink()
    with pytest.raises(DataError, match="do not prove") as error:
        command(data, "--ledger", run, "--json")
    assert error.value.exit_code == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["findings"][0]["kind"] == "missing"
    assert "rank 1 should have, and left no ledger" in err
    with pytest.raises(UsageError):
        command(data, "--ledger", data)


def test_a_run_knows_its_data_set(run, data, capsys):
    with pytest.raises(UsageError, match=r"does not say where its data set is .* give DATA"):
        command("--ledger", run)
    (run / "config.toml").write_text(f'data = "{data}"\n')
    assert command("--ledger", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"] == str(data)
    with pytest.raises(UsageError, match="name the folder of a dataset"):
        command()


def test_several_folders_are_one_run(tmp_path, data, capsys):
    attempt(tmp_path / "a", data, 0, 12, 2, 5)
    attempt(tmp_path / "b", data, 60, 6, 3, 10)
    assert command(data, "--ledger", tmp_path / "a", tmp_path / "b") == 0
    assert drop_progress(capsys.readouterr().err) == (
        "epochs 0-1 exactly once (2 x 60 samples); 2 attempts on 2 and 3 ranks\n"
    )
