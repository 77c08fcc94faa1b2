"""Keys and values of one layer, and what its new tokens see."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

Mask = mx.array | str | None

# What a layer's cache does with new keys and values (B, 2 x heads, T, head_dim), and answers: those
# to attend to.
CacheUpdate = Callable[[mx.array], mx.array]

# What a caller does with arrays on the way: `mx.eval` bounds memory, `mx.async_eval` computes while
# the graph of later layers is being built. The model itself only builds graphs, so that `mx.grad`
# and `mx.compile` may go through it.
Evaluate = Callable[[mx.array], None]


@dataclass(frozen=True)
class LayerSnapshot:
    """A place to which a `LayerCache` can go back; only a sliding layer has to hold an array."""

    length: int
    state: mx.array | None = None


class LayerCache:
    """Keys and values of one layer, one array (B, 2 x heads, T, head_dim): heads of keys first.

    `length` counts all tokens seen; a sliding layer keeps its last `window - 1`: a later token sees
    no more. The buffer has capacity behind what is kept, for a canvas's keys and values while it is
    denoised. A write makes a new array, in the old one's memory unless a mark or fork still
    needs that.
    """

    def __init__(self, window: int | None):
        self.window = window
        self.length = 0
        self.size = 0
        self._buffer: mx.array | None = None
        self._capacity = 0  # tokens that the next larger buffer shall hold at least
        self._canvas = 0  # tokens behind what is kept, of the canvas that was read last
        # Whose canvas that is; whoever finds that it is another's decodes all positions.
        self.reader: object | None = None

    @property
    def state(self) -> mx.array | None:
        """Keys and values of the tokens kept; None is none."""
        return None if self._buffer is None or not self.size else self._buffer[:, :, : self.size]

    def set_state(self, length: int, state: mx.array | None) -> None:
        """Replace everything: `length` tokens have been seen, and these are kept."""
        self.length = length
        self.size = 0 if state is None else state.shape[2]
        self._buffer = state
        self.reader = None

    def read(self, new: mx.array, positions: mx.array | None = None) -> mx.array:
        """Give what is kept, followed by new keys and values of a canvas, which are not kept.

        Those of one row stand in the buffer until the next call, which may say of which
        `positions` (P,) of them its own are. A held batch of one serves any number of new rows.
        """
        if positions is not None:
            return self._reread(new, positions)
        self._canvas = new.shape[2]
        if self._buffer is None or not self.size:
            self._buffer = new
            return new
        end = self.size + new.shape[2]
        if len(new) != len(self._buffer):
            # Of many rows at once, none keeps its own copy of the context.
            kept = self._buffer[:, :, : self.size]
            return mx.concatenate([mx.broadcast_to(kept, (len(new), *kept.shape[1:])), new], axis=2)
        if self._buffer.shape[2] < end:
            self._buffer = self._with_capacity(self._buffer[:, :, : self.size], end)
        own = copy(self._buffer)  # the object, not the numbers: a fork may hold it too
        own[:, :, self.size : end] = new
        self._buffer = own
        return self._buffer[:, :, :end]

    def _reread(self, new: mx.array, positions: mx.array) -> mx.array:
        """Give what is kept and the canvas, in which new keys and values stand at `positions`."""
        assert self._buffer is not None
        own = copy(self._buffer)
        own[:, :, positions + self.size] = new
        self._buffer = own
        return own[:, :, : self.size + self._canvas]

    def reserve(self, count: int) -> None:
        """That many tokens will come: appending them then copies nothing that is held."""
        if self.window is None:
            self._capacity = max(self._capacity, self.size + count)

    def _with_capacity(self, kept: mx.array, count: int) -> mx.array:
        """Make a buffer that begins with what is kept and holds `count` tokens at least."""
        batch, heads, length, size = kept.shape
        buffer = mx.zeros((batch, heads, max(self._capacity, count), size), dtype=kept.dtype)
        buffer[:, :, :length] = kept
        return buffer

    def append(self, new: mx.array) -> mx.array:
        """Give what `read` gives, and keep the new ones for later calls."""
        count = new.shape[2]
        first = not self.size
        seen = self.read(new)
        self.length += count
        self.reader = None
        drop = 0 if self.window is None else seen.shape[2] - (self.window - 1)
        if drop > 0:
            self.set_state(self.length, mx.contiguous(seen[:, :, drop:]))
            return seen
        if first:
            self._buffer = self._with_capacity(seen, count)
        self.size += count
        return seen

    def snapshot(self) -> LayerSnapshot:
        """Remember where the cache stands; of a full layer, its length says enough."""
        if self.window is None:
            return LayerSnapshot(self.length)
        return LayerSnapshot(self.length, self.state)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Go back to a mark made earlier in the same sequence of tokens."""
        if self.window is not None or not snapshot.length:
            self.set_state(snapshot.length, snapshot.state)
        else:
            self.length = self.size = snapshot.length
            self.reader = None

    def trim(self, mark: LayerSnapshot, length: int) -> bool:
        """Go back to `length` tokens, at least a mark's of the same sequence; False if a sliding
        layer no longer holds what stands between, and nothing is changed."""
        held = mark.length if self.window is None else 0
        if mark.state is not None:
            held = mark.state.shape[2]
        new, kept = self.length - mark.length, length - mark.length
        if held + new == self.size:  # nothing has been dropped
            self.length, self.size, self.reader = length, held + kept, None
            return True
        if not kept:
            self.restore(mark)
            return True
        if new > self.size or self._buffer is None or self.window is None:
            return False
        since = self._buffer[:, :, self.size - new : self.size - new + kept]
        state = since if mark.state is None else mx.concatenate([mark.state, since], axis=2)
        self.set_state(length, mx.contiguous(state[:, :, -(self.window - 1) :]))
        return True

    def fork(self) -> "LayerCache":
        """Another that holds the same; memory is shared until one of them writes."""
        other = LayerCache(self.window)
        other.length, other.size, other._buffer = self.length, self.size, self._buffer
        other._capacity = self._capacity
        return other

    def encoder_mask(self, count: int) -> Mask:
        """Mask for `count` new tokens: causal, and in a sliding layer `q - k < window`."""
        if self.window is None or self.size + count <= self.window:
            return "causal"
        ahead = mx.arange(self.size, self.size + count)[:, None] - mx.arange(self.size + count)
        return (ahead >= 0) & (ahead < self.window)


# Of a layer's cache and a number of new tokens: what these see, causal or (T, kept + T).
EncoderMask = Callable[[LayerCache, int], Mask]
