"""The server under requests that schemathesis makes: a minute, so not among the fast tests."""

import subprocess
import sys
from pathlib import Path

from servers import serving, tiny

from mlx_diffgemma import DiffusionGemma, Tokenizer

# Whether a status and a kind of content stand in the document, too.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"


def quick() -> tuple[DiffusionGemma, Tokenizer]:
    """A model that knows nothing, and says so in two steps."""
    model, tokenizer = tiny()
    model.generation = model.generation.override(max_new_tokens=24, max_denoising_steps=2)
    model.context = 120  # of answers whose length nobody sets
    return model, tokenizer


def test_schemathesis_finds_no_crash(tmp_path: Path) -> None:
    """Requests made from the OpenAPI document, and around it."""
    with serving(quick) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                f"{server.url}/openapi.json",
                f"--checks={CHECKS}",
                "--max-examples=3",
                "--phases=coverage,fuzzing",
                "--request-timeout=240",
                "--seed=1",
            ],
            capture_output=True,
            text=True,
            timeout=550,
            cwd=tmp_path,  # where it leaves a cache
        )
    assert done.returncode == 0, done.stdout[-3000:]
