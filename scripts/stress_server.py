"""Eight clients at once for a minute: nothing may get lost, and each gets only its own answer.

    python scripts/stress_server.py [--seconds 60] [--clients 8]

Starts a server with the Sudoku checkpoint. An answer belongs to a client if it repeats the clues
of its puzzle, which no other client is asking about.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai

SUDOKU = Path(__file__).parents[1] / "tests" / "data" / "sudoku6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    lines = (SUDOKU / "puzzles.txt").read_text().splitlines()[1:]
    puzzles = [line.split()[0] for line in lines]
    command = [sys.executable, "-m", "mlx_diffgemma", "serve", "-m", str(SUDOKU), "--port", "0"]
    server = subprocess.Popen([*command, "--max-batch", "8"], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    url = next(
        found[1] for line in server.stderr if (found := re.search(r"running on (http://\S+)", line))
    )
    threading.Thread(target=server.stderr.read, daemon=True).start()

    def memory() -> float:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    counts: Counter[str] = Counter()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120)
    ends = time.monotonic() + arguments.seconds

    def talk(first: int) -> None:
        for turn in range(10**6):
            if time.monotonic() > ends:
                return
            cells = puzzles[(first + turn * arguments.clients) % len(puzzles)]
            prompt = "\n".join(cells[i : i + 6] for i in range(0, 36, 6))
            message = {"role": "user", "content": prompt}
            counts["asked"] += 1
            text = ""
            if turn % 2:
                stream = client.chat.completions.create(
                    model="x",
                    messages=[message],
                    seed=turn,
                    stream=True,  # type: ignore[list-item]
                )
                for chunk in stream:
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            else:
                done = client.chat.completions.create(
                    model="x",
                    messages=[message],
                    seed=turn,  # type: ignore[list-item]
                )
                text = done.choices[0].message.content or ""
            counts["answered"] += 1
            answer = text.replace("\n", "")
            kept = sum(a == b for a, b in zip(cells, answer, strict=False) if a != ".")
            clues = sum(a != "." for a in cells)
            counts["own" if len(answer) == 36 and kept >= clues - 1 else "other"] += 1

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(arguments.clients)]
    time.sleep(1)
    trend = [memory()]
    for thread in threads:
        thread.start()
    for _ in range(6):
        time.sleep(arguments.seconds / 6)
        trend.append(memory())
    for thread in threads:
        thread.join()
    print(dict(counts))
    print("memory in MB, before and after each sixth:", *(f"{mb:.1f}" for mb in trend))
    print(httpx.get(f"{url}/health").text)
    server.terminate()
    server.wait(30)


if __name__ == "__main__":
    main()
