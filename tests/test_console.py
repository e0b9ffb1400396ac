"""``softcl COMMAND``: the commands' own functions, and what is said of any other word."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from softcl.__main__ import COMMANDS, main


def test_a_command_is_its_module(capsys):
    for name, (module, _) in COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        shown = capsys.readouterr().out
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        assert stopped.value.code == 0 and shown == capsys.readouterr().out
        assert f"softcl.{name} " in shown.splitlines()[0]


def test_a_commands_exit_code_and_errors_are_its_own(capsys):
    assert main(["train", "--epoch", "3"]) == 2
    assert "softcl.train: unknown flag --epoch; did you mean --epochs?" in capsys.readouterr().err


def test_help_and_unknown_words(capsys):
    for line in ([], ["--help"]):
        assert main(line) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("softcl 0.")
    assert main(["tarin", "--epochs", "3"]) == 2
    error = capsys.readouterr().err.splitlines()
    known = ", ".join(COMMANDS)
    assert error[0] == f"softcl: tarin: must be one of {known}; did you mean train?"


def test_python_m_softcl_loads_no_command_that_is_not_called():
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "softcl"], capture_output=True, text=True
    )
    assert answer.returncode == 0 and answer.stdout.startswith("usage: softcl COMMAND")
    assert "timm" not in answer.stderr and "softcl.train" not in answer.stderr
