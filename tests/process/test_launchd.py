"""`serve --print-launchd`: what it prints is a service that runs as the command would here."""

import plistlib
import sys
from pathlib import Path

import pytest
from command import run

ASKED = ("serve", "--model", "a model & <more>", "--port", "9001", "--allowed-host", "*")


def test_a_launch_agent_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_DIFFGEMMA_MODEL", raising=False)
    home, here = {"HOME": str(tmp_path), "HF_HOME": "/models"}, tmp_path / "here"
    here.mkdir()
    key = {"MLX_DIFFGEMMA_API_KEY": "secret"}
    done = run(*ASKED, "--print-launchd", cwd=here, **home, **key)
    assert done.returncode == 0, done.stderr
    agent = plistlib.loads(done.stdout.encode())
    assert agent["ProgramArguments"] == [sys.executable, "-m", "mlx_diffgemma", *ASKED]
    assert agent["WorkingDirectory"] == str(here.resolve())
    assert agent["EnvironmentVariables"]["MLX_DIFFGEMMA_API_KEY"] == "secret"
    assert agent["EnvironmentVariables"]["HF_HOME"] == "/models"
    assert "MLX_DIFFGEMMA_MODEL" not in agent["EnvironmentVariables"]
    assert agent["RunAtLoad"] is agent["KeepAlive"] is True
    log = tmp_path / "Library" / "Logs"
    assert Path(agent["StandardErrorPath"]).parent == Path(agent["StandardOutPath"]).parent == log
    assert f"LaunchAgents/{agent['Label']}.plist" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_no_launch_agent_can_say_is_one_sentence() -> None:
    for name in ("a\x01b", "a\udcff"):
        done = run("serve", "--model", name, "--print-launchd")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: a launch agent cannot have control characters")
        assert len(done.stderr.splitlines()) == 1
