"""Tensors whose surroundings are poison, so that a kernel that reads or writes outside of them is seen."""

import contextlib
import types

import torch
from torch import Tensor

from softpick_attention import backward, forward, visibility

HALO = 4096
LAYOUTS = ("dense", "heads_first", "gaps", "offset")


def place(x: Tensor, layout: str = "dense") -> Tensor:
    """`x` with other strides, among HALO elements of poison on each side.

    dense: as it is. heads_first: a transposed [B, H, T, D]. gaps: poison between rows, heads and tokens too, strides
    odd. offset: begins at an odd element. Poison is NaN, True in a mask, and a number beyond all indices.
    """
    poison = {torch.bool: True, torch.int32: 2**30, torch.int64: 2**30}.get(x.dtype, torch.nan)
    shape = x.transpose(1, 2).shape if layout == "heads_first" else x.shape
    room = [n + more for n, more in zip(shape, (0, 1, 1, 3), strict=True)] if layout == "gaps" else list(shape)
    before = HALO + (layout == "offset")
    size = torch.Size(room).numel()
    buffer = torch.full((before + size + HALO,), poison, dtype=x.dtype, device=x.device)
    placed = buffer[before : before + size].view(room)
    if layout == "gaps":
        placed = placed[tuple(slice(n) for n in shape)]
    placed = placed.transpose(1, 2) if layout == "heads_first" else placed
    return placed.copy_(x)


def every_second(x: Tensor, filler: Tensor) -> Tensor:
    """`x` with an element of `filler` behind each of its own."""
    return torch.stack([x, filler.expand_as(x)], -1).flatten(-2)[..., ::2]


class Guarded(types.SimpleNamespace):
    """Stands in for the module torch: what it allocates is uninitialised in the worst way, and has guarded borders.

    Floating tensors of empty and empty_like begin as NaN, integers as a number beyond all indices.
    """

    def __init__(self) -> None:
        super().__init__(buffers=[])

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, dtype, device) -> Tensor:
        inside = torch.Size(size).numel()
        buffer = torch.empty(2 * HALO + inside, dtype=dtype, device=device)
        buffer.view(torch.uint8).fill_(0xFF if dtype.is_floating_point else 0x7F)
        self.buffers.append((buffer, inside))
        return buffer[HALO : HALO + inside].view(size)

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype, device=x.device)

    def zeros(self, *size, dtype, device) -> Tensor:
        return self.empty(*size, dtype=dtype, device=device).zero_()

    def check(self) -> None:
        """Nothing was stored outside of a tensor."""
        for buffer, inside in self.buffers:
            poison = 0xFF if buffer.dtype.is_floating_point else 0x7F
            for name, border in (("before", buffer[:HALO]), ("behind", buffer[HALO + inside :])):
                touched = (border.view(torch.uint8) != poison).nonzero()
                assert not len(touched), (
                    f"stored {name} a tensor of {inside} elements of {buffer.dtype}: byte {touched[0].item()} of the "
                    f"border, {len(touched)} bytes in all"
                )


@contextlib.contextmanager
def guarded(monkeypatch):
    """Every allocation of the kernels' launchers is guarded; the guards are checked at the end."""
    memory = Guarded()
    with monkeypatch.context() as patch:
        for module in (forward, backward, visibility):
            patch.setattr(module, "torch", memory)
        yield memory
    assert memory.buffers, "nothing was allocated through the guard"
    memory.check()
