"""Held-out pictures asked here and of transformers, with the same weights of the model that sees.

    python scripts/compare_pictures.py --model DIR [--count 300] [--seeds 1] [--write DIR]

`--write` only stores pictures and questions: one sheet `pictures.png`, and `questions.jsonl`.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from tiny_pictures import Question, held_out
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma import Request, Tokenizer, generate, load
from mlx_diffgemma.text.vocabulary import Vocabulary

SHEET = 64  # pixels of a side of a stored picture: what the model sees of it


def write(cases: list[tuple[Image.Image, Question]], directory: Path) -> None:
    """One picture beside the other, and a line for each."""
    sheet = Image.new("RGB", (SHEET * len(cases), SHEET))
    for i, (image, _) in enumerate(cases):
        small = image.resize((SHEET, SHEET), Image.Resampling.BICUBIC)
        sheet.paste(small, (SHEET * i, 0))
    sheet.save(directory / "pictures.png", optimize=True)
    lines = (json.dumps(vars(question)) + "\n" for _, question in cases)
    (directory / "questions.jsonl").write_text("".join(lines))


def asked(image: Image.Image, question: Question) -> list[dict[str, object]]:
    """The chat: a picture, then the question."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question.prompt}]
    return [{"role": "user", "content": parts}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=21, help="seed of the pictures")
    parser.add_argument("--theirs", type=Path, help="weights for transformers, if not the same")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    cases = [(image, question) for _, image, question in held_out(given.count, given.pictures)]
    if given.write:
        write(cases, given.write)
        return
    torch.set_num_threads(1)
    model, tokenizer = load(given.model)
    kind = DiffusionGemmaForBlockDiffusion
    reference = kind.from_pretrained(given.theirs or given.model, dtype=torch.float32).eval()
    assert model.sight is not None
    vision = model.sight.config.vision
    processor = Gemma4ImageProcessorPil(
        patch_size=vision.patch_size,
        pooling_kernel_size=vision.pool,
        max_soft_tokens=model.sight.config.budget,
    )
    vocabulary = Vocabulary(model, tokenizer)
    good: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for seed in range(given.seeds):
        for image, question in cases:
            chat = asked(image, question)
            ours = generate(model, tokenizer, chat, seed=seed)
            ids = [int(token) for token in Request(chat).prepare(model, vocabulary).prompt]
            theirs = of_reference(reference, processor, tokenizer, ids, image, seed)
            good[question.kind].append((ours == question.answer, theirs == question.answer))
    everything = [pair for pairs in good.values() for pair in pairs]
    print(f"{'question':<10}{'n':>6}{'mlx-diffgemma':>16}{'transformers':>16}")
    for name, pairs in [*sorted(good.items()), ("all", everything)]:
        mine, other = (100 * sum(each) / len(pairs) for each in zip(*pairs, strict=True))
        print(f"{name:<10}{len(pairs):>6}{mine:>14.1f} %{other:>14.1f} %")


def of_reference(
    model: DiffusionGemmaForBlockDiffusion,
    processor: Gemma4ImageProcessorPil,
    tokenizer: Tokenizer,
    ids: list[int],
    image: Image.Image,
    seed: int,
) -> str:
    """What transformers answers to the same ids and the same picture."""
    pixels = processor([image], return_tensors="pt")
    tokens = torch.tensor([ids])
    torch.manual_seed(seed)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels["pixel_values"].float(),
        image_position_ids=pixels["image_position_ids"],
        mm_token_type_ids=(tokens == model.config.image_token_id).long(),
    )
    return tokenizer.decode(out.sequences[0, len(ids) :].tolist())


if __name__ == "__main__":
    main()
