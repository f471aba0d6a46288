"""Softmax models under transformers' own attention and in engines: as right as ours, compiled, or refused by name."""

import collections
import functools

import pytest
import torch
from test_model_masks import LENGTHS, alone, packed, padded
from tiny_softpick import close, double_parameters, oracle, tiny_config, tiny_model, tokens
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    modeling_flash_attention_utils,
)
from transformers.masking_utils import sdpa_mask

from hf_softpick import SoftpickModel

NORMALIZERS = ["softmax", "scaled_softmax"]


def flash(query, key, value, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, window_size=(-1, -1), **_):
    """What flash_attn computes, [B, T, H, D] or, with boundaries, [tokens, H, D]; causal from the bottom right."""
    if cu_seqlens_q is not None:
        parts = [
            x[None].split(edges.diff().tolist(), 1)
            for x, edges in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
        ]
        return torch.cat(
            [flash(*p, softmax_scale=softmax_scale, window_size=window_size)[0] for p in zip(*parts, strict=True)]
        )
    length, keys = query.shape[1], key.shape[1]
    distance = torch.arange(length)[:, None] + keys - length - torch.arange(keys)
    seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else keys))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, seen, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.fixture
def implementation(request, monkeypatch):
    """Flash attention needs a GPU: its function is replaced, what transformers does around it is real."""
    utils = modeling_flash_attention_utils
    functions = flash, flash, None, utils._pad_input, utils._unpad_input
    known = collections.defaultdict(bool, window_size=True)  # besides what every version takes
    process = functools.partial(utils._process_flash_attention_kwargs, supports_mapping=known)
    if hasattr(utils, "_process_with_kvcache_kwargs_fn"):  # 5.17 returns the one alone
        process = process, None
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, process))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # flex compiles at every call, for minutes
        yield request.param


ALL = pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"], indirect=True)


def softmax_model(normalizer: str, implementation: str, **changes):
    model = tiny_model(normalizer, **changes)
    model.config._attn_implementation = implementation  # past the check that this machine has it
    return model


@ALL
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_packed_and_padded_rows(normalizer, window, implementation):
    """Flash attention looks for documents in a single row alone, and for the window where the call names it."""
    model = softmax_model(normalizer, implementation, sliding_window=window)
    ids, positions, documents = packed(LENGTHS)
    expected = alone(model, documents)
    for rows in (1, 2):
        call = {"input_ids": ids[:rows], "position_ids": positions[:rows]}
        mask = torch.ones_like(ids[:rows])
        for more in ({}, {"use_cache": False}, {"attention_mask": mask}):
            close(model(**call, **more).logits, expected[:rows])
        mask[:, 79] = 0
        if implementation == "flash_attention_2":
            with pytest.raises(ValueError, match="does not keep packed documents apart"):
                model(**call, attention_mask=mask)
        else:
            close(model(**call, attention_mask=mask).logits[:, :79], expected[:rows, :79])
    for side in ("left", "right"):
        ids, mask, documents = padded((70, 3, 41), side)
        for position_ids in (None, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)):
            if position_ids is None and side == "right" or position_ids is not None:
                logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=True).logits
                for row, document in enumerate(documents):
                    exact = oracle(double_parameters(model), model.config, document)[0]
                    close(logits[row][mask[row].bool()], exact)


@ALL
@pytest.mark.parametrize("kind", ["document begins at the chunk", "explicit mask"])
def test_what_they_cannot_say_is_refused(kind, implementation):
    model, ids = softmax_model("softmax", implementation), tokens(1, 12)
    past = model(ids[:, :5], use_cache=True).past_key_values
    if kind == "explicit mask":  # flex would add True to the scores, flash would read it as padding
        call = {"input_ids": ids, "attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()}
        expected, message = model(ids).logits, "does not take the attention_mask"
    else:
        positions = torch.arange(7)[None]
        call = {"input_ids": ids[:, 5:], "position_ids": positions, "past_key_values": past}
        expected, message = model(ids[:, 5:]).logits, "does not keep packed documents apart"
    if implementation == "sdpa" or (implementation == "flex_attention" and kind != "explicit mask"):
        close(model(**call).logits, expected)
    else:
        with pytest.raises(ValueError, match=message):
            model(**call)


def register(monkeypatch, name: str, function, mask_function=None) -> None:
    for interface, value in ((AttentionInterface, function), (AttentionMaskInterface, mask_function)):
        mapping = {**interface._global_mapping, **({name: value} if value else {})}
        monkeypatch.setattr(interface, "_global_mapping", mapping)


class EngineAttention:
    """A layer of an engine: the keys of each sequence in a cache of its own, and what runs now told from outside."""

    def __init__(self, window: int | None):
        self.window, self.running, self.cache = window, [], {}

    def __call__(self, query, key, value, scale):
        """[tokens, heads * 8] each, the running sequences end to end -> the same for the outputs."""
        query, key, value = (x.view(-1, x.shape[-1] // 8, 8).transpose(0, 1) for x in (query, key, value))
        outputs = []
        for sequence, q, k, v in zip(
            [sequence for sequence, _ in self.running],
            *(x.split([length for _, length in self.running], 1) for x in (query, key, value)),
            strict=True,
        ):
            if sequence in self.cache:
                k, v = (torch.cat(pair, 1) for pair in zip(self.cache[sequence], (k, v), strict=True))
            self.cache[sequence] = k, v
            distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
            seen = (distance >= 0) & (distance < (self.window or k.shape[1]))
            attention = torch.nn.functional.scaled_dot_product_attention
            outputs.append(attention(q, k, v, seen, scale=scale, enable_gqa=True))
        return torch.cat(outputs, 1).transpose(0, 1).flatten(1)


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """As vLLM and SGLang register theirs: one row of tokens, the layer chosen by its index, the mask not read."""
    assert attention_mask is None
    query, key, value = (x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value))
    return attention_instances[module.layer_idx](query, key, value, scaling), None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_an_engine_with_a_cache_of_its_own(normalizer, window, monkeypatch):
    """Prompts in one row, then a token each, as vLLM calls the backbone that it builds from the configuration."""
    model = tiny_model(normalizer, sliding_window=window)
    register(monkeypatch, "vllm", engine_attention)
    config = tiny_config(normalizer, sliding_window=window)
    config._attn_implementation = "vllm"
    assert SoftpickModel.is_backend_compatible()
    backbone = AutoModel.from_config(config, dtype=torch.float32).eval()
    backbone.load_state_dict(model.model.state_dict())
    layers = {index: EngineAttention(config.sliding_window) for index in range(config.num_hidden_layers)}
    prompts = [tokens(n, seed=n) for n in (7, 3, 5)]

    def step(parts, positions):
        for layer in layers.values():
            layer.running = [(index, len(part)) for index, part in enumerate(parts)]
        call = {"position_ids": torch.cat(positions)[None], "attention_instances": layers}
        return backbone(input_ids=torch.cat(parts)[None], use_cache=False, return_dict=False, **call)[0][0]

    with torch.no_grad():
        hidden = step(prompts, [torch.arange(len(p)) for p in prompts])
        expected = [model(p[None], use_cache=True) for p in prompts]
        close(model.lm_head(hidden), torch.cat([out.logits[0] for out in expected]))
        more = [torch.tensor([9]), torch.tensor([11]), torch.tensor([13])]
        hidden = step(more, [torch.tensor([len(p)]) for p in prompts])
        caches = [out.past_key_values for out in expected]
        logits = [model(t[None], past_key_values=c).logits[0] for t, c in zip(more, caches, strict=True)]
        close(model.lm_head(hidden), torch.cat(logits))


@pytest.mark.parametrize("normalizer", ["softpick", "rectified_softmax", "scaled_softpick"])
def test_engines_are_refused_by_name(normalizer, monkeypatch):
    """vLLM and SGLang write their attention into the configuration, TGI names it, and all ask the class before."""
    model, message = tiny_model(normalizer), f"(?s){normalizer}.*computes softmax.*generate"
    for name in ("vllm", "sglang", "tgi"):
        register(monkeypatch, name, engine_attention)
        config = tiny_config(normalizer)
        config._attn_implementation = name
        for load in (AutoModel.from_config, AutoModelForCausalLM.from_config, SoftpickModel):
            with pytest.raises(ValueError, match=message):
                load(config)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_config(tiny_config(normalizer), attn_implementation=name)
    for name in ("auto", "eager"):
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match=message):
            model.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=2, eos_token_id=63), progress_bar=False)


@pytest.mark.parametrize("name", ["sdpa", "paged|eager"])
def test_continuous_batching_equals_generate(name):
    """transformers' own engine: prompts of several lengths in one row, boundaries as dictionaries, its own mask."""
    model = tiny_model("scaled_softmax", "sdpa", sliding_window=6)
    prompts = [tokens(n, seed=n).tolist() for n in (17, 5, 9)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=63, pad_token_id=0)
    expected = [model.generate(torch.tensor([p]), generation_config=settings)[0, len(p) :].tolist() for p in prompts]
    model.set_attn_implementation(name)
    size = {"page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size": 16}  # 5.17: the second
    config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, **size)
    out = model.generate_batch(prompts, settings, continuous_batching_config=config, progress_bar=False)
    assert {tuple(o.prompt_ids): o.generated_tokens for o in out.values()} == {
        tuple(p): e for p, e in zip(prompts, expected, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sdpa", ["use_cache", "position_ids"]),
        ("flex_attention", ["attention_mask", "position_ids"]),
        ("engine", ["position_ids"]),
        ("masked", ["use_cache", "position_ids"]),
        ("masked", ["attention_mask"]),
    ],
)
def test_one_graph(name, arguments, monkeypatch):
    """No branch reads a tensor."""
    torch._dynamo.reset()
    attention = AttentionInterface._global_mapping["sdpa"]
    register(monkeypatch, "engine", attention)
    register(monkeypatch, "masked", attention, sdpa_mask)
    model, ids = softmax_model("softmax", name), tokens(2, 80)
    mask, positions = torch.ones_like(ids), torch.arange(80).expand(2, -1)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    call = {"use_cache": False, **{key: given[key] for key in arguments}}
    with torch.no_grad():
        expected = tiny_model("softmax")(ids).logits
        close(torch.compile(model, backend="eager", fullgraph=True)(ids, **call).logits, expected)


def test_documents_that_cannot_be_kept_apart_stop_the_compiled_graph_too(monkeypatch):
    torch._dynamo.reset()
    register(monkeypatch, "masked", AttentionInterface._global_mapping["sdpa"], sdpa_mask)
    model, (ids, positions, _) = softmax_model("softmax", "masked"), packed(LENGTHS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="does not keep packed documents apart"):
        compiled(ids, position_ids=positions, attention_mask=torch.ones_like(ids))


def test_dropout_reaches_transformers_attention():
    model, ids = tiny_model("softmax", "sdpa", attention_dropout=0.5), tokens(1, 30)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(0)
    one, other = model(ids).logits, model(ids).logits
    assert (one - other).abs().max() > 0.1
