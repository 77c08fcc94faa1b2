"""The counts of scripts/count_kernels.py by hand; in a process of its own: it patches MLX."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from paths import ROOT

SCRIPTS = ROOT / "scripts"
# Runs what each line of its input holds, with a recorder that has counted nothing yet.
WORKER = """
import json, sys, traceback
from count_kernels import Recorder
recorder = Recorder()
recorder.install()
import mlx.core as mx
import mlx.nn as nn
for line in sys.stdin:
    x, w = mx.ones((4, 8)), mx.ones((640, 8))
    mx.eval(x, w)
    recorder.__init__()
    recorder.start(640, 4)
    try:
        exec(json.loads(line), {"mx": mx, "nn": nn, "recorder": recorder, "x": x, "w": w})
        recorder.stop()
        print(json.dumps([vars(step) for step in recorder.steps]), flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), flush=True)
"""
Count = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def count() -> Iterator[Count]:
    """What the steps of a few lines of code cost."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(SCRIPTS)},
    ) as process:

        def ask(code: str) -> list[dict[str, Any]]:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            steps = json.loads(process.stdout.readline())
            assert isinstance(steps, list), steps
            return steps

        yield ask


def test_kernels_and_bytes_by_hand(count: Count) -> None:
    (step,) = count("logits = x @ w.T; mx.eval(mx.softmax(logits, axis=-1), mx.argmax(logits, -1))")
    assert step["kernels"] == {"Matmul": 1, "Softmax": 1, "ArgReduce": 1}
    copy = 4 * 4 * 640
    # The product and the softmax are written, the product is read twice; the table is no logits.
    assert step["table_read"] == 4 * 640 * 8
    assert (step["vocabulary_written"], step["vocabulary_read"]) == (2 * copy, 2 * copy)
    assert step["vocabulary_arrays"] == 4


def test_equal_nodes_count_each(count: Count) -> None:
    """MLX's own export merges them, which its evaluation does not."""
    (step,) = count("mx.eval(mx.exp(x) + mx.exp(x))")
    assert step["kernels"] == {"Exp": 2, "Add": 1}


def test_what_is_left_over_counts_where_it_is_computed(count: Count) -> None:
    """The export used to change the graph, so that the product was computed, and counted, again."""
    first, second = count(
        "y = x @ w.T; a = mx.exp(y) + mx.exp(y); b = mx.log(y); mx.eval(a); recorder.mark(); "
        "b.tolist()"
    )
    assert first["kernels"] == {"Matmul": 1, "Exp": 2, "Add": 1}
    assert second["kernels"] == {"Log": 1}


def test_norms_and_compiled_chains_are_one_kernel(count: Count) -> None:
    (step,) = count(
        "f = mx.compile(lambda a: mx.tanh(a * 2) * 3); n = mx.fast.rms_norm(x, None, 1e-6); "
        "mx.eval(f(n) + nn.gelu_approx(x))"
    )
    assert step["kernels"] == {"rms_norm": 1, "compiled": 2, "Add": 1}


@pytest.mark.parametrize(
    ("code", "kernels"),
    [
        ("mx.eval(mx.concatenate([x, x, mx.exp(x)]))", {"Exp": 1, "Concatenate": 1, "Copy": 2}),
        ("mx.eval(mx.concatenate([x, x[:0]]))", {"Concatenate": 1}),
        ("mx.eval(mx.stack([x, x], axis=-1))", {"Concatenate": 1, "Copy": 1}),
    ],
)
def test_each_array_joined_is_a_copy(count: Count, code: str, kernels: dict[str, int]) -> None:
    (step,) = count(code)
    assert step["kernels"] == kernels


@pytest.mark.parametrize(
    ("code", "kernels"),
    [
        ("mx.eval(x.T.reshape(-1))", {"Copy": 1}),
        ("mx.eval(x.T.reshape(2, 4, 4))", {}),
        ("mx.eval(x[:, ::3].reshape(-1))", {"Copy": 1}),
        ("mx.eval(x[:, ::2].reshape(-1))", {}),  # every second item of all
        ("mx.eval(mx.split(x, 2, axis=1)[0].flatten())", {"Copy": 1}),
        ("mx.eval(x[1:3].reshape(-1))", {}),
        ("mx.eval(x.view(mx.int16).reshape(-1))", {}),
        ("mx.eval(x.T.view(mx.int16))", {"Copy": 1}),
        ("mx.eval(mx.broadcast_to(x[:1], (4, 8)).reshape(-1))", {"Copy": 1}),
        # What reads a turned array alone writes a turned one.
        ("mx.eval(mx.exp(x.T).reshape(-1))", {"Exp": 1, "Copy": 1}),
        ("mx.eval((x.T + x.reshape(8, 4)).reshape(-1))", {"Add": 1}),
        # Arrays computed before lie as they lie.
        ("y = x.T; mx.eval(y); recorder.mark(); mx.eval(y.reshape(-1))", {"Copy": 1}),
    ],
)
def test_views_that_cannot_be_are_copies(count: Count, code: str, kernels: dict[str, int]) -> None:
    assert count(code)[-1]["kernels"] == kernels


COPY = "from copy import copy; i = mx.array([1, 0]); y = mx.exp(x); z = copy(y); "


@pytest.mark.parametrize(
    ("code", "kernels"),
    [
        # Nobody needs the array any more.
        ("z[i] = x[:2]; mx.eval(z)", {"Exp": 1, "Scatter": 1}),
        ("z[1:2] = x[:1]; mx.eval(z)", {"Exp": 1, "SliceUpdate": 1}),
        ("z[1:2] = (y * 2)[:1]; mx.eval(z)", {"Exp": 1, "Multiply": 1, "SliceUpdate": 1}),
        ("mx.eval(z.at[i].add(x[:2]))", {"Exp": 1, "Scatter Sum": 1}),
        # It is what is written, too; is read later; is wanted.
        ("z[i] = y[:2]; mx.eval(z)", {"Exp": 1, "Copy": 1, "Scatter": 1}),
        ("z[1:2] = y[:1]; mx.eval(z)", {"Exp": 1, "Copy": 1, "SliceUpdate": 1}),
        ("z[i] = x[:2]; mx.eval(z + y.T.T)", {"Exp": 1, "Copy": 1, "Scatter": 1, "Add": 1}),
        ("z[1:2] = x[:1]; mx.eval(y, z)", {"Exp": 1, "Copy": 1, "SliceUpdate": 1}),
        # It is turned; it is one item, or a part of many.
        ("z = z.T; z[i] = w[:2, :4]; mx.eval(z)", {"Exp": 1, "Copy": 1, "Scatter": 1}),
        (
            "z = mx.broadcast_to(y[:1, :1], (4, 8)); z[1:2] = x[:1]; mx.eval(z)",
            {"Exp": 1, "Copy": 1, "SliceUpdate": 1},
        ),
        (
            "z = mx.exp(mx.arange(80000.0))[:8]; z[1:2] = x[0, :1]; mx.eval(z)",
            {"Arange": 1, "Exp": 1, "Copy": 1, "SliceUpdate": 1},
        ),
        # It was there before: a buffer is taken over, if nothing else reads it.
        ("z = copy(x); z[1:2] = w[:1]; mx.eval(z)", {"SliceUpdate": 1}),
        ("z = copy(x); z[1:2] = w[:1]; mx.eval(z, y)", {"Exp": 1, "Copy": 1, "SliceUpdate": 1}),
        ("z = copy(x); z[i] = w[:2]; mx.eval(z)", {"Copy": 1, "Scatter": 1}),
    ],
)
def test_changing_a_part_copies_what_cannot_be_taken_over(
    count: Count, code: str, kernels: dict[str, int]
) -> None:
    (step,) = count(COPY + code)
    assert step["kernels"] == kernels


QUANTIZED = """
recorder.stop(); q, v = mx.quantize(mx.ones((64, 64))), mx.ones((4, 128)); mx.eval(q, v)
recorder.start(640, 4); mx.eval(mx.quantized_matmul("""


@pytest.mark.parametrize(
    ("code", "kernels"),
    [
        ("mx.eval(x @ x.T)", {"Matmul": 1}),
        ("mx.eval(x[:, :4] @ w[:4, 2:6])", {"Matmul": 1}),
        ("mx.eval(x[:, ::2] @ w[:, ::2].T)", {"Copy": 2, "Matmul": 1}),
        # The items of a single row or column must follow each other.
        ("mx.eval(x[:1, ::2] @ w[:4])", {"Copy": 1, "Matmul": 1}),
        ("mx.eval(x[:, :4] @ w[:4, :1])", {"Copy": 1, "Matmul": 1}),
        (QUANTIZED + "v[:, :64], *q))", {"Copy": 1, "QuantizedMatmul": 1}),
        (QUANTIZED + "v.reshape(8, 64), *q))", {"QuantizedMatmul": 1}),
        ("mx.eval(mx.softmax(x.T, axis=-1))", {"Copy": 1, "Softmax": 1}),
        ("mx.eval(mx.softmax(x[:2], axis=-1))", {"Softmax": 1}),
        ("mx.eval(mx.fast.rms_norm(x.T, None, 1e-6))", {"Copy": 1, "rms_norm": 1}),
        # Heads of 4: norms before heads and rows change places read what the product wrote.
        ("mx.eval(mx.fast.rms_norm(x.reshape(4, 2, 4), None, 1e-6))", {"rms_norm": 1}),
        (
            "mx.eval(mx.fast.rms_norm(x.reshape(4, 2, 4).swapaxes(0, 1), None, 1e-6))",
            {"Copy": 1, "rms_norm": 1},
        ),
    ],
)
def test_operands_that_are_not_in_rows_are_copied(
    count: Count, code: str, kernels: dict[str, int]
) -> None:
    (step,) = count(code)
    assert step["kernels"] == kernels


def test_waiting_is_counted_and_starting_is_not(count: Count) -> None:
    """Every `async_eval` used to count as a wait, 23 of them in a step that waits once."""
    first, second = count(
        "y = mx.exp(x); mx.async_eval(y); z = mx.log(y); mx.async_eval(z); z.tolist(); z.tolist(); "
        "recorder.mark(); mx.async_eval(mx.exp(z))"
    )
    assert (first["syncs"], second["syncs"]) == (1, 0)


def test_a_step_of_ours() -> None:
    """It waits once, and a layer stays as lean as it is: 55 kernels, then 46, now 42."""
    made = []
    for layers in ("1", "2"):
        command = [sys.executable, str(SCRIPTS / "count_kernels.py"), "--layers", layers]
        done = subprocess.run(
            [*command, "--vocabulary", "4096", "--json"], capture_output=True, text=True, check=True
        )
        made.append(json.loads(done.stdout)["ours"])
    assert [step["syncs"] for step in made] == [1, 1]
    one, two = (sum(step["kernels"].values()) for step in made)
    assert two - one <= 42
