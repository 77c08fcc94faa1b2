"""What users of other tools type out of habit, and what to say to it."""

SCHEDULE = (
    "this model denoises a canvas on a schedule: the temperature falls from t_max to t_min of "
    "generation_config.json, and tokens are accepted by their entropy. --seed gives other answers; "
    "--steps, --speed and --sampler confidence change how they come about; --mode causal writes a "
    "token at a time, at a --temperature"
)

_MEMORY = "the context is as long as memory allows; --max-memory says how much that is"

_NO_CODE = "nothing that a repository holds is ever executed, so there is nothing to trust"

_SAID = {
    **dict.fromkeys(
        ("--temp", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty"),
        SCHEDULE,
    ),
    **dict.fromkeys(("--max-kv-size", "--ctx-size", "--num-ctx", "--kv-bits"), _MEMORY),
    "--trust-remote-code": _NO_CODE,
    **dict.fromkeys(
        ("--export-gguf", "--gguf-path"),
        "no other runtime reads this model as GGUF; what is written is safetensors",
    ),
    "--draft-model": "the model drafts for itself with --mode speculative",
    **dict.fromkeys(
        ("--report-to", "--project-name"),
        "log.jsonl in the adapter's folder has all events of a run, and progress.svg shows them",
    ),
    "--lora-layers": "it is called --num-layers",
    "--verbose": "statistics are printed unless --quiet is given",
    "--ignore-chat-template": "prompts go through the checkpoint's template; from Python, token "
    "ids are taken as they are",
    "--system-prompt": "it is called --system",
    "--max-new-tokens": "it is called --max-tokens",
    "--num-steps": "it is called --steps",
}


def said_to(option: str) -> str | None:
    """A sentence on an option that other tools have; None where there is nothing to say."""
    known = _SAID.get(option)
    return None if known is None else f"there is no {option}: {known}"
