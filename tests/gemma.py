"""The small model's tokenizer with a template that knows thinking and tools."""

from paths import DATA

from mlx_diffgemma import Tokenizer
from mlx_diffgemma.checkpoint.load import EMBEDDED

TEMPLATE = DATA / "gemma_chat_template.jinja"


def gemma_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_directory(EMBEDDED)
    tokenizer._template_source = TEMPLATE.read_text()
    return tokenizer
