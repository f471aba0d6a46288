"""transformers' models on the Hub kernel, loaded from the folder that LOCAL_KERNELS names. Run by test_hub_kernel.py.

Real are the `kernels` package (it resolves the name, checks the metadata and imports the folder), the loader of
transformers, its registries, masks, caches and models, and the Triton kernels, in Triton's interpreter. Changed is one
number: transformers asks for a later `kernels` than there is, and that lower bound is lifted. The reference is
hf_softpick's attention in plain PyTorch.
"""

import sys
from pathlib import Path

import kernels
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import import_utils

assert "transformers.integrations.hub_kernels" not in sys.modules
import_utils.is_kernels_available.__wrapped__.__defaults__ = ("0.17", import_utils.KERNELS_MAX_VERSION)

from transformers import (  # noqa: E402
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask  # noqa: E402

import hf_softpick  # noqa: E402, F401 -- registers the reference

REPOSITORY = "hf-softpick/softpick-attention"
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    attention_dropout=0.0,
)


def pair(family: str = "llama", **changes) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights: on the Hub kernel, and on the reference."""
    models = []
    for name in (REPOSITORY, "softpick"):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**{**SIZES, **changes})
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=name).eval())
    return models


@pytest.fixture(scope="module")
def llama():
    return pair()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


def same_gradients(loss: Tensor, expected: Tensor, model: nn.Module, reference: nn.Module) -> None:
    close(loss, expected)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(reference.parameters()))
    for (name, _), p, q in zip(model.named_parameters(), ours, theirs, strict=True):
        assert q.norm() > 0, name
        assert (p - q).norm() <= 1e-4 * q.norm(), name


def test_it_is_the_kernel_of_the_local_folder(llama):
    (loaded,) = kernels.get_loaded_kernels()
    assert str(loaded.metadata.name) == "softpick-attention"
    assert Path(loaded.module.__file__).parent.name == "torch-universal"
    assert llama[0].config._attn_implementation == REPOSITORY
    assert AttentionInterface()[REPOSITORY] is loaded.module.flash_attn_forward
    assert AttentionMaskInterface()[REPOSITORY] is sdpa_mask


def test_names_are_told_apart(llama):
    """Guards the tests here: with near-zero scores softmax would pass for softpick."""
    softmax = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES), attn_implementation="sdpa").eval()
    softmax.load_state_dict(llama[0].state_dict())
    ids = tokens(1, 12)
    assert (softmax(ids).logits - llama[1](ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_and_gradients(llama, use_cache):
    ids = tokens(2, 19)
    model, reference = llama
    ours, theirs = (m(ids, labels=ids, use_cache=use_cache) for m in llama)
    close(ours.logits, theirs.logits)
    same_gradients(ours.loss, theirs.loss, model, reference)


@pytest.mark.parametrize("hole", [(0, 6), (11, 17), (4, 7)], ids=["left", "right", "inside"])
def test_padded_batch(llama, hole):
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.int64)
    mask[1, slice(*hole)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # which begins no document
    call = dict(attention_mask=mask, position_ids=position_ids, labels=labels)
    ours, theirs = (m(ids, **call) for m in llama)
    same_gradients(ours.loss, theirs.loss, *llama)
    real = mask[1] == 1
    close(ours.logits[0], llama[1](ids[:1]).logits[0])
    close(ours.logits[1, real], llama[1](ids[1:, real]).logits[0])


LENGTHS = (5, 1, 8, 3)


@pytest.mark.parametrize(
    "given", ["positions, no cache", "positions and a cache", "positions and a mask", "boundaries"]
)
def test_packed_documents_are_apart(llama, given):
    """transformers itself keeps them apart in the first case only, by a dense mask."""
    ids = tokens(1, sum(LENGTHS))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    call = {
        "positions, no cache": dict(use_cache=False),
        "positions and a cache": dict(use_cache=True),
        "positions and a mask": dict(attention_mask=causal),
        "boundaries": dict(use_cache=True, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries),
        "boundaries and a mask": dict(attention_mask=causal, cu_seq_lens_q=boundaries),
    }[given]
    model, reference = llama
    logits = model(ids, position_ids=position_ids, **call).logits[0]
    expected = [reference(document[None]).logits[0] for document in ids[0].split(LENGTHS)]
    close(logits, torch.cat(expected))
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    same_gradients((logits * cotangent).sum(), (torch.cat(expected) * cotangent).sum(), model, reference)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(llama, cache, padded):
    """A static cache begins longer than the prompt, and its keys behind the end are hidden."""
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    if padded:
        mask[0, :3], ids[0, :3] = 0, 0
    settings = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    settings.update({} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True})
    ours, theirs = (m.generate(ids, attention_mask=mask, **settings) for m in llama)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_prefill_of_a_static_cache_is_aligned_at_the_top_left(llama):
    """No mask is handed over then, though there are more keys than queries."""
    ids = tokens(1, 6)
    model, reference = llama
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        close(model(ids, past_key_values=cache).logits, reference(ids, use_cache=False).logits)
        close(
            model(ids[:, :1], past_key_values=cache).logits[:, -1],
            reference(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1],
        )


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_window(family):
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    model, reference = pair(family, sliding_window=5, num_key_value_heads=1, **kinds)
    ids = tokens(2, 14)
    ours, theirs = (m(ids, labels=ids) for m in (model, reference))
    close(ours.logits, theirs.logits)
    same_gradients(ours.loss, theirs.loss, model, reference)
    ours, theirs = (m.generate(ids, max_new_tokens=3, do_sample=False) for m in (model, reference))
    assert torch.equal(ours, theirs)


def attention(queries=9, **arguments):
    """The attention function itself, over 9 random keys."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, queries, 16), torch.randn(1, 2, 9, 16)
    arguments.setdefault("attention_mask", None)
    (loaded,) = kernels.get_loaded_kernels()
    return loaded.module.flash_attn_forward(arguments.pop("module", nn.Identity()), q, k, k, **arguments)


@pytest.mark.parametrize("queries", [9, 5, 1])
@pytest.mark.parametrize("window", [None, 4])
def test_what_no_mask_means(llama, queries, window):
    """One query sees all keys, several are aligned with the first; for models that make no masks of their own."""
    index = torch.arange(9)
    distance = (index[:queries, None] if queries > 1 else 8) - index
    mask = (distance >= 0) & (distance < (window or 9))
    expected, weights = attention(queries, attention_mask=mask.expand(1, 1, queries, 9))
    assert weights is None and expected.shape == (1, queries, 4, 16)
    for documents in ({}, {"position_ids": index[None, :queries]}, {"cu_seq_lens_q": torch.tensor([0, queries])}):
        close(attention(queries, sliding_window=window, **documents)[0], expected)


def test_under_torch_compile(llama):
    """One break in the graph, no error and no other result."""
    expected = attention()[0]
    (loaded,) = kernels.get_loaded_kernels()
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    step = torch.compile(lambda: loaded.module.flash_attn_forward(llama[0], q, k, k, None)[0] * 2, backend="eager")
    close(step(), expected * 2)


class Encoder(nn.Module):
    is_causal = False


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position_bias"),
        ({"cache": object()}, "paged cache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"module": Encoder()}, "Encoder is not causal"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "attention_mask == 0"),
        ({"attention_mask": torch.ones(1, 9, dtype=torch.bool)}, r"\(1, 9\), expected torch.bool \[B, 1 or H, T, S\]"),
        ({"attention_mask": torch.ones(1, 1, 9, 8, dtype=torch.bool)}, "attention mask has shape"),
        ({"cu_seqlens_q": torch.tensor([0, 9])}, "cu_seqlens_q is not read"),
        ({"seq_idx": torch.zeros(1, 9)}, "seq_idx is not read"),
        ({"cu_seq_lens_k": torch.tensor([0, 9])}, "cu_seq_lens_q missing"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 9.0])}, "documents \\+ 1"),
        ({"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 4, 9])}, "same boundaries"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_refused_by_name(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_what_is_off_is_not_refused(llama):
    attention(softcap=None, s_aux=None, output_attentions=False, use_cache=True, num_items_in_batch=torch.tensor(3))


def test_the_benchmark_runs_and_its_results_match():
    """By the runner of `kernels benchmark`, with its check against the dense reference; times here mean nothing."""
    from kernels.cli import benchmark as runner

    folder = Path(__file__).parent.parent.parent / "kernels/softpick_attention"
    (found,) = runner.discover_benchmark_classes(folder / "benchmarks/benchmark.py", folder)
    (loaded,) = kernels.get_loaded_kernels()
    build = str(Path(loaded.module.__file__).parent.parent)
    results, _ = runner.run_benchmark_class(found, 1, 0, build, is_local=True, revision="")
    assert len(results) == 4 and all(timing.verified for timing in results.values())
