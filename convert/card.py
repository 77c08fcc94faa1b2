"""The README.md of a converted checkpoint."""

from pathlib import Path


def model_card(directory: Path, source: str, name: str, what: str) -> str:
    """Write README.md: where it comes from, what was done with it, how to run it."""
    from huggingface_hub import ModelCardData, metadata_load

    readme = directory / "README.md"
    try:
        known = (metadata_load(readme) or {}) if readme.exists() else {}
    except Exception:  # YAML or text that cannot be read must not cost the conversion
        known = {}
    card = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        license=known.get("license"),
        license_link=known.get("license_link"),
        base_model=known.get("base_model") or (None if Path(source).exists() else source),
        tags=["mlx", "diffusion_gemma"],
    )
    return (
        f"---\n{card.to_yaml()}\n---\n\n# {name}\n\n"
        f"{Path(source).name if Path(source).exists() else source}, {what}.\n\n"
        f'```bash\npip install mlx-diffgemma\nmlx-diffgemma generate --model {name} "Hello"\n```\n'
    )
