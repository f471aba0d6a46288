"""Random source checkpoints by their own names, and what they compute: plain float64 formulas without the package."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ANCESTOR = {
    "attention_bias": False,
    "attn_impl": "parallel_softpick_attn",
    "architectures": ["TransformerForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_size": 32,
    "initializer_range": 0.006,
    "max_position_embeddings": 16,
    "model_type": "transformer",
    "norm_eps": 1e-06,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.3",
    "vocab_size": 64,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 64,
}


def _fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if "norm" in name or name.endswith("attn.s")
        else torch.randn(shape, generator=generator) * 0.25
        for name, shape in shapes.items()
    }


def ancestor(**changes) -> tuple[dict, dict[str, Tensor]]:
    """(config, tensors) as the ancestor writes them; intermediate_size by its rule is 256 at this width."""
    config = {**ANCESTOR, **changes}
    size, heads = config["hidden_size"], config["num_heads"]
    key_size = size // heads * (config.get("num_kv_heads") or heads)
    inner = config.get("intermediate_size") or 256
    shapes = {"model.embeddings.weight": (config["vocab_size"], size)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "attn_norm.weight": (size,), p + "mlp_norm.weight": (size,)}
        for name, rows in (("q", size), ("k", key_size), ("v", key_size), ("o", size)):
            shapes[f"{p}attn.{name}_proj.weight"] = (rows, size)
        shapes |= {f"{p}mlp.{name}_proj.weight": (inner, size) for name in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (size, inner)
        if "scaled" in config["attn_impl"]:
            shapes[p + "attn.s"] = (heads, 1)
    shapes["model.norm.weight"] = (size,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], size)
    tensors = _fill(shapes)
    if "scaled" in config["attn_impl"]:
        n = torch.arange(2, 4 * config["max_position_embeddings"] + 2, dtype=torch.float32)
        tensors |= {f"model.layers.{i}.attn.logn": n.log()[:, None, None] for i in range(config["num_hidden_layers"])}
    return config, tensors


def llama(**changes) -> tuple[dict, dict[str, Tensor]]:
    """(config, tensors) of a Llama checkpoint."""
    config = {**LLAMA, **changes}
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or size // heads
    keys, inner = head * config["num_key_value_heads"], config["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], size)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (size,), p + "post_attention_layernorm.weight": (size,)}
        for name, rows, columns in (
            ("q", head * heads, size),
            ("k", keys, size),
            ("v", keys, size),
            ("o", size, head * heads),
        ):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.get("attention_bias"):
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {f"{p}mlp.{name}_proj.weight": (inner, size) for name in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (size, inner)
    shapes["model.norm.weight"] = (size,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], size)
    return config, _fill(shapes)


def write(folder: Path, config: dict, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint folder with config.json and safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def ancestor_logits(config: dict, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """[T, vocab] of tokens [T], as the ancestor computes them: its epsilon, its log(n), its window."""
    implementation = config["attn_impl"]
    return _logits(
        tensors,
        tokens,
        names=("model.embeddings", "attn_norm", "attn", "mlp_norm"),
        heads=config["num_heads"],
        layers=config["num_hidden_layers"],
        eps=config["norm_eps"],
        theta=config["rope_theta"],
        window=config.get("window_size"),
        kind=implementation.split("_", 1)[1].removesuffix("_attn").removesuffix("attn").removeprefix("scaled"),
        softpick_eps=1e-8 if implementation.startswith("naive") else 1e-6,
    )


def llama_logits(config: dict, tensors: dict[str, Tensor], tokens: Tensor, kind: str = "") -> Tensor:
    """[T, vocab] of tokens [T]; `kind` "" is softmax."""
    return _logits(
        tensors,
        tokens,
        names=("model.embed_tokens", "input_layernorm", "self_attn", "post_attention_layernorm"),
        heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        window=config.get("sliding_window"),
        kind=kind,
        softpick_eps=1e-6,
    )


def _logits(tensors, tokens, names, heads, layers, eps, theta, window, kind, softpick_eps):
    w = {name: tensor.double() for name, tensor in tensors.items()}
    embeddings, norm_1, attention, norm_2 = names
    length = tokens.shape[0]
    position = torch.arange(length)
    visible = position[:, None] >= position
    if window is not None:
        visible &= position[:, None] - position < window

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    def project(x, name):
        bias = w.get(name + ".bias")
        return torch.nn.functional.linear(x, w[name + ".weight"], bias)

    def rotate(x):  # [T, heads, size]: element i of the first half and i of the second are one complex number
        half = x.shape[-1] // 2
        angle = position[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    x = w[embeddings + ".weight"][tokens]
    for layer in range(layers):
        p = f"model.layers.{layer}."
        h = norm(x, p + norm_1)
        q = project(h, f"{p}{attention}.q_proj").view(length, heads, -1)
        k, v = (project(h, f"{p}{attention}.{n}_proj").view(length, -1, q.shape[-1]) for n in "kv")
        q, k = rotate(q), rotate(k)
        if f"{p}{attention}.s" in w:
            q = q * w[f"{p}{attention}.s"] * (position + 2.0).double().log()[:, None, None]
        group = heads // k.shape[1]
        mixed = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // group].T * q.shape[-1] ** -0.5
            mixed.append(source_weights(scores, visible, kind.strip("_"), softpick_eps) @ v[:, head // group])
        x = x + project(torch.cat(mixed, -1), f"{p}{attention}.o_proj")
        h = norm(x, p + norm_2)
        gate = project(h, p + "mlp.gate_proj")
        x = x + project(gate * gate.sigmoid() * project(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    head = w.get("lm_head.weight", w[embeddings + ".weight"])
    return norm(x, "model.norm") @ head.T


def source_weights(scores: Tensor, visible: Tensor, kind: str, eps: float) -> Tensor:
    """[T, T] weights as the ancestor's kernels define them: eps is added after the shift by the largest score."""
    if kind == "softpick":
        largest = scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
        difference = (scores.expm1() * (-largest).exp()).where(visible, torch.zeros(()).double())
        return difference.clamp_min(0) / (difference.abs().sum(-1, keepdim=True) + eps)
    kept = visible & (scores >= 0) if kind == "rectified" else visible
    e = scores.exp() * kept
    return e / e.sum(-1, keepdim=True).clamp_min(1e-300)
