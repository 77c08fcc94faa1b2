"""A checkpoint whose weights come when they are needed and go again; all else is known before."""

import gc
from collections.abc import Iterator

import mlx.core as mx

from ..errors import CheckpointError
from ..model.diffusion_gemma import DiffusionGemma, is_text
from ..model.settings import Speed
from .files import read_headers
from .fit import fit
from .info import info_of
from .load import (
    build_model,
    check_ids,
    check_tensors,
    computed_in,
    directory_of,
    keep_in_memory,
    lazy_model,
    read_generation,
    read_tokenizer,
)
from .vision import sight_of
from .weights import DType


class LateModel:
    """Knows a checkpoint by its headers and its tokenizer, with which requests can be prepared.

    Attributes:
        model: has no weights before `loading` is through, nor behind `unload`.
        tokenizer: the checkpoint's.
        stays: says that it is not loaded unless somebody asks.

    Args:
        path_or_repo, dtype, speed: as in `load`.
        memory: bytes that the model may take, its context included, where it is alone.

    Raises:
        TooLarge: it would not fit.
        CheckpointError: as `load`, but for what only the bytes of the weights can tell.
    """

    stays = False

    def __init__(
        self,
        path_or_repo: str | None,
        *,
        memory: int,
        dtype: DType | None = None,
        speed: Speed = "faithful",
    ):
        keep_in_memory()
        self._directory = directory_of(path_or_repo)
        self._dtype = computed_in(dtype)
        self._headers = headers = read_headers(self._directory)
        self._info = found = info_of(headers, self._dtype)
        decided = fit(found, memory)
        self._keep_table = decided.keep_table
        self._table_bytes = found.table_bytes if decided.keep_table else 0
        self._generation = read_generation(self._directory, headers.config)
        tensors = {name: tensor for name, tensor in headers.tensors.items() if is_text(name)}
        self._tensors = set(tensors)
        self.model = self._empty()
        check_tensors(self.model, tensors)
        self.model.context = decided.context
        left = memory - self._table_bytes
        self.model.sight = sight_of(
            headers, self._dtype, lambda: fit(found, left, pictures=True).context
        )
        self.model.generation = self.model.generation.with_speed(speed)
        self.tokenizer = read_tokenizer(self._directory)
        check_ids(self.model, self.tokenizer)

    def _empty(self) -> DiffusionGemma:
        return build_model(self._headers.config, self._generation, self._tensors)

    def needs(self, tokens: int, pictures: bool) -> int:
        """Count the bytes that loading it takes, with so many tokens, perhaps of pictures."""
        return self._info.memory_needed(tokens, pictures=pictures) + self._table_bytes

    def context_bytes(self, tokens: int, pictures: bool) -> int:
        """Count the bytes that they take where it is loaded; the first picture loads the tower."""
        found = self._info.cache_bytes_per_token * tokens + self._info.cache_bytes_window
        if pictures and self.model.sight is not None and not self.model.sight.loaded:
            found += self._info.vision_bytes
        return found

    def loading(self) -> Iterator[None]:
        """Load the weights, with a pause behind each layer; for the thread that owns MLX.

        Left before its end, it leaves the model without weights.

        Raises:
            CheckpointError: a file is gone, damaged, or no longer what it was at first.
        """
        if read_headers(self._directory) != self._headers:
            raise CheckpointError(f"{self._directory} has changed since the server was started")
        loaded = lazy_model(self._headers, self._dtype)
        for layer, own in zip(
            loaded.layers, loaded.model.encoder.language_model.layers, strict=True
        ):
            mx.eval(layer.parameters(), layer.constants, own.parameters())
            yield
        mx.eval(loaded.parameters(), loaded.constants)
        yield
        if self._keep_table:
            loaded.keep_table(mx.eval)
        self.model.take_weights(loaded)

    def unload(self) -> None:
        """Free the weights; for the thread that owns MLX."""
        self.model.take_weights(self._empty())
        if self.model.sight is not None:
            self.model.sight.unload()
        gc.collect()
        mx.clear_cache()
