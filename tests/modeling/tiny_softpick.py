"""Tiny models, and a Llama in plain float64 formulas that shares no code with the package: what they must compute.

The oracle runs one document without padding or cache. Everything else (packing, padding, caches, windows over caches)
must equal it, document by document.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from hf_softpick import SoftpickConfig, SoftpickForCausalLM

NORMALIZERS = ("softpick", "softmax", "rectified_softmax", "scaled_softpick", "scaled_softmax")
IMPLEMENTATIONS = ("eager", "tiled")
# A model with every kind of argument matters more than its size; scores have a deviation of about 1.
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def count_kernel_calls(monkeypatch) -> list[str]:
    """From now on, the implementation of each call of the kernels is appended to the list."""
    from hf_softpick.modeling import attention_interface

    ran, run = [], attention_interface.triton_attention

    def counted(*arguments):
        ran.append("triton" if arguments[-1] else "triton_fast")
        return run(*arguments)

    monkeypatch.setattr(attention_interface, "triton_attention", counted)
    return ran


def tiny_config(normalizer: str = "softpick", **changes) -> SoftpickConfig:
    return SoftpickConfig(normalizer=normalizer, **{**SIZES, **changes})


def tiny_model(normalizer: str = "softpick", implementation: str = "auto", seed: int = 0, **changes):
    """A SoftpickForCausalLM in eval mode whose every parameter, norms and head_scale included, is random."""
    torch.manual_seed(seed)
    model = SoftpickForCausalLM._from_config(tiny_config(normalizer, **changes), attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "head_scale" in name:
                parameter.uniform_(0.2, 0.6)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def double_parameters(model) -> dict[str, Tensor]:
    """The model's parameters as float64 leaves, for `oracle`."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def oracle(parameters: dict[str, Tensor], config, document: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [T, vocab] of one document [T] and the weights [H, T, T] of each layer."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    length, size = document.shape[0], config.hidden_size // config.num_attention_heads
    position = torch.arange(length, dtype=torch.float64)
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = position[:, None] * frequency
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (config.sliding_window or length))

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(x):  # [heads, T, size]: the first half of a head is paired with the second
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = parameters["model.embed_tokens.weight"][document]
    all_weights = []
    for index in range(config.num_hidden_layers):
        p = {n.split(f"layers.{index}.")[1]: w for n, w in parameters.items() if f"layers.{index}." in n}
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            (h @ p[f"self_attn.{n}_proj.weight"].T).view(length, -1, size).transpose(0, 1) for n in ("q", "k", "v")
        )
        q, k = rotate(q), rotate(k)
        k, v = (torch.stack([t[h * key_heads // heads] for h in range(heads)]) for t in (k, v))
        scores = q @ k.transpose(1, 2) * size**-0.5
        if config.normalizer.startswith("scaled_"):
            scores = scores * p["self_attn.head_scale"][:, None, None] * (position + 2).log()[:, None]
        weights = oracle_weights(scores, visible, config.normalizer)
        all_weights.append(weights)
        x = x + (weights @ v).transpose(0, 1).reshape(length, -1) @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate, up = h @ p["mlp.gate_proj.weight"].T, h @ p["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ p["mlp.down_proj.weight"].T
    return norm(x, parameters["model.norm.weight"]) @ parameters["lm_head.weight"].T, all_weights


def oracle_weights(scores: Tensor, visible: Tensor, normalizer: str) -> Tensor:
    """The definitions of the design's section 2, without any shift: the scores of these models are small."""
    kind = normalizer.removeprefix("scaled_")
    if kind == "softpick":
        r = torch.where(visible, scores.exp() - 1, 0.0)
        return r.relu() / (r.abs().sum(-1, keepdim=True) + 1e-6)
    kept = visible & (scores >= 0) if kind == "rectified_softmax" else visible
    e = torch.where(kept, scores.exp(), 0.0)
    return e / e.sum(-1, keepdim=True).clamp_min(1e-300)


def oracle_loss(parameters: dict[str, Tensor], config, documents: list[Tensor]) -> Tensor:
    """Mean next-token loss over the targets of all documents, none of which crosses a boundary."""
    losses = []
    for document in documents:
        log_p = oracle(parameters, config, document)[0][:-1].log_softmax(-1)
        losses.append(-log_p.gather(1, document[1:, None])[:, 0])
    return torch.cat(losses).mean()


def assert_same_gradients(model, loss: Tensor, parameters: dict[str, Tensor], expected: Tensor, atol: float = 1e-5):
    """Both losses, and the gradient of every parameter of `model` against its float64 twin."""
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), atol=2e-6, rtol=1e-5)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad.double(), gradient, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), atol=atol, rtol=1e-4)


HIDE_PACKAGE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_softpick":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def without_package(folder: Path) -> dict[str, str]:
    """Environment of a process where hf_softpick cannot be imported, even if it is installed; files go to `folder`."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text(HIDE_PACKAGE)
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "hidden"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }
