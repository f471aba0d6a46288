"""Times of softpick attention, each beside its dense reference: `kernels benchmark <repository>`.

A result that does not match the reference stops the run. On CPU (Triton's interpreter) the sizes are only large
enough to see that everything runs.
"""

import torch
from kernels.benchmark import Benchmark
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softpick by its definition, in float32: q [B, T, H, D], k, v [B, T, Hkv, D] to [B, T, H, D]."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    length, keys = q.shape[2], k.shape[2]
    seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    shift = scores.masked_fill(~seen, 0).amax(-1, keepdim=True).clamp_min(0)
    p = ((scores - shift).exp() - (-shift).exp()) * seen
    weights = p.relu() / (p.abs().sum(-1, keepdim=True) + 1e-6 * (-shift).exp())
    return (weights @ v).transpose(1, 2)


class SoftpickAttentionBenchmark(Benchmark):
    """Causal attention of bfloat16 tensors: forward, forward with backward, and one step of decoding."""

    seed = 0

    def _setup(self, dim: int, queries: int = 0, heads: int = 16, key_heads: int = 16) -> None:
        slow = self.device == "cpu"
        keys, heads, key_heads = (48, 2, min(key_heads, 1)) if slow else (4096, heads, key_heads)
        dtype = torch.float32 if slow else torch.bfloat16
        shapes = ((queries or keys, heads), (keys, key_heads), (keys, key_heads))
        self.inputs = [torch.randn(2, t, h, dim, device=self.device, dtype=dtype) for t, h in shapes]
        self.grad = torch.randn_like(self.inputs[0])

    def _backward(self, function) -> Tensor:
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        gradients = torch.autograd.grad(function(*inputs), inputs, self.grad)
        return torch.cat([x.flatten() for x in gradients])

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernel.softpick_attn_func(q, k, v, causal=True)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One row of the batch at a time: the score matrices of all of them would not fit."""
        return torch.cat([dense(*(x[i : i + 1] for x in (q, k, v))) for i in range(q.shape[0])]).to(q.dtype)

    def setup_forward_d64(self):
        self._setup(64)

    def benchmark_forward_d64(self):
        self.out = self._forward(*self.inputs)

    def verify_forward_d64(self) -> Tensor:
        return self._dense(*self.inputs)

    def setup_forward_d128(self):
        self._setup(128)

    def benchmark_forward_d128(self):
        self.out = self._forward(*self.inputs)

    def verify_forward_d128(self) -> Tensor:
        return self._dense(*self.inputs)

    def setup_backward_d64_grouped(self):
        self._setup(64, key_heads=2)

    def benchmark_backward_d64_grouped(self):
        self.out = self._backward(self._forward)

    def verify_backward_d64_grouped(self) -> Tensor:
        return self._backward(self._dense)

    def setup_decode_d128(self):
        self._setup(128, queries=1, heads=32, key_heads=8)

    def benchmark_decode_d128(self):
        self.out = self.kernel.softpick_attn_with_kvcache(*self.inputs)

    def verify_decode_d128(self) -> Tensor:
        return self._dense(*self.inputs)
