"""transformers' own models under attn_implementation="softpick", against their eager form with formulas patched in.

The reference runs one document at a time, without padding or cache, so that only the formulas and the model's own
causal (or windowed) mask are trusted.
"""

import importlib

import pytest
import torch
from tiny_softpick import close, oracle_weights
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import hf_softpick  # noqa: F401 -- registers the names

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.0,
)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 6},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},  # one layer of each kind
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
    },
}
NAMES = ["softpick", "rectified_softmax"]


def config_of(family: str, **changes):
    unused = ("hidden_size", "num_key_value_heads", "head_dim", "intermediate_size") if family == "gpt2" else ()
    sizes = {name: size for name, size in SIZES.items() if name not in unused}
    return CONFIG_MAPPING[family](**{**sizes, **FAMILIES.get(family, {}), **changes})


def foreign(family: str, name: str, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation=name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reference(monkeypatch):
    """A copy of a model whose eager attention computes the formulas of `name`: call it with one document."""

    def build(model, name: str):
        def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = query.double() @ key.double().transpose(2, 3) * scaling
            weights = oracle_weights(scores, attention_mask == 0, name)
            return (weights @ value.double()).transpose(1, 2).to(value.dtype), weights

        monkeypatch.setattr(importlib.import_module(type(model).__module__), "eager_attention_forward", attention)
        copy = (
            type(model)._from_config(type(model.config)(**model.config.to_dict()), attn_implementation="eager").eval()
        )
        copy.load_state_dict(model.state_dict())
        return copy

    return build


def logits_of(copy, document: Tensor) -> Tensor:
    return copy(document[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", [*NAMES, "softmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_formulas(reference, family, name):
    model, ids = foreign(family, name), tokens(2, 70)
    copy = reference(model, name)
    ours, theirs = model(ids, labels=ids), copy(ids, labels=ids, use_cache=False)
    close(ours.logits, theirs.logits, atol=1e-3)
    ours.loss.backward(), theirs.loss.backward()
    for (parameter_name, p), q in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-5, parameter_name


def test_names_are_told_apart():
    """Guards the tests here: near-zero scores would make all normalizers pass for each other."""
    ids = tokens(1, 20)
    softpick, rectified, softmax = (foreign("llama", n)(ids).logits for n in (*NAMES, "softmax"))
    assert min((softpick - softmax).abs().max(), (softpick - rectified).abs().max()) > 0.1


@pytest.mark.parametrize("mask", ["no mask", "ones"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(reference, family, name, use_cache, mask):
    model, lengths, ids = foreign(family, name), [(7, 1, 16), (12, 8, 4)], tokens(2, 24)
    copy = reference(model, name)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    attention_mask = torch.ones_like(ids) if mask == "ones" else None
    for rows in (1, 2):
        logits = model(
            ids[:rows],
            position_ids=position_ids[:rows],
            use_cache=use_cache,
            attention_mask=None if attention_mask is None else attention_mask[:rows],
        ).logits
        for row in range(rows):
            alone = torch.cat([logits_of(copy, document) for document in ids[row].split(lengths[row])])
            close(logits[row], alone, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_cu_seq_lens_separate_documents(reference, family):
    model, ids, lengths = foreign(family, "softpick"), tokens(1, 24), (7, 1, 16)
    copy = reference(model, "softpick")
    cu = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
    logits = model(
        ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=16,
        max_length_k=16,
    ).logits
    close(logits[0], torch.cat([logits_of(copy, d) for d in ids[0].split(lengths)]), atol=1e-3)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens", "seq_idx"])
def test_boundaries_under_other_names(name):
    """As TRL and other collators pass them; what disagrees with the positions that it rotates is refused."""
    model, ids, lengths = foreign("llama", "softpick"), tokens(1, 24), (7, 1, 16)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    given = {name: documents if name == "seq_idx" else cu}
    expected = model(ids, position_ids=position_ids).logits
    close(model(ids, position_ids=position_ids, **given).logits, expected)
    if name == "seq_idx":
        with pytest.raises(ValueError, match="seq_idx and position_ids do not begin documents at the same tokens"):
            model(ids, **given)
    with pytest.raises(ValueError, match="nothing about its queries"):
        model(ids, cu_seq_lens_k=cu)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_equals_no_padding(reference, family, name, side):
    model, ids = foreign(family, name), tokens(3, 20)
    copy = reference(model, name)
    index, count = torch.arange(20), torch.tensor([20, 3, 11])[:, None]
    mask = (index >= 20 - count if side == "left" else index < count).long()
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(ids.masked_fill(mask == 0, 0), attention_mask=mask, position_ids=position_ids).logits
    for row in range(3):
        real = mask[row].bool()
        close(logits[row][real], logits_of(copy, ids[row][real]), atol=1e-3)


@pytest.mark.parametrize("sizes", [[1] * 16, [9, 1, 6]])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_recomputed_ones(reference, family, kind, sizes):
    model, ids = foreign(family, "softpick"), tokens(2, 16)
    copy = reference(model, "softpick")
    past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    logits = [model(part, past_key_values=past, use_cache=True).logits for part in ids.split(sizes, 1)]
    expected = torch.stack([logits_of(copy, row) for row in ids])
    close(torch.cat(logits, 1), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_recomputation(reference, family, name, kind):
    model, ids, lengths = foreign(family, name), tokens(3, 10), (10, 3, 7)
    copy = reference(model, name)
    mask = torch.stack([torch.arange(10) >= 10 - n for n in lengths]).long()
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0, cache_implementation=kind)
    out = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        document = ids[row, 10 - length :]
        for _ in range(5):
            document = torch.cat([document, logits_of(copy, document)[-1].argmax()[None]])
        assert out[row, 10:].tolist() == document[-5:].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [[10, 1, 1, 1, 3], [4, 12], [12, 4], [16]])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_packed_rows_over_a_cache_stay_apart(reference, family, sizes, kind):
    """Going on from a packed row must not show the last document the ones before it."""
    model, ids = foreign(family, "softpick"), tokens(1, 16)
    copy = reference(model, "softpick")
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None]
    past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    logits = [
        model(part, position_ids=positions, past_key_values=past, use_cache=True).logits
        for part, positions in zip(ids.split(sizes, 1), position_ids.split(sizes, 1), strict=True)
    ]
    close(torch.cat(logits, 1)[0], torch.cat([logits_of(copy, d) for d in ids[0].split([7, 9])]), atol=1e-3)


def test_packed_and_padded_rows_over_a_static_cache(reference):
    """Right padding after two documents, and a prompt longer than it: what a query's own column is must not slip."""
    model, ids = foreign("llama", "softpick"), tokens(2, 12)
    copy = reference(model, "softpick")
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    position_ids = torch.stack([torch.tensor([*range(4), *range(5), 0, 0, 0]), torch.arange(12)])
    past = StaticCache(model.config, max_cache_len=20)
    logits = model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=past, use_cache=True).logits
    close(logits[0, :9], torch.cat([logits_of(copy, d) for d in ids[0, :9].split([4, 5])]), atol=1e-3)
    close(logits[1], logits_of(copy, ids[1]), atol=1e-3)


@pytest.mark.parametrize("covered", [4, 6, 8])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_over_fewer_tokens_than_were_seen_is_refused(kind, covered):
    """It would hide the newest tokens from themselves."""
    model, ids = foreign("llama", "softpick"), tokens(1, 9)
    past = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    model(ids[:, :6], past_key_values=past, use_cache=True)
    with pytest.raises(ValueError, match=f"attention_mask covers {covered} tokens, .* together hold 9"):
        model(ids[:, 6:], attention_mask=torch.ones(1, covered), past_key_values=past, use_cache=True)


def test_output_attentions_is_a_call_argument(reference):
    model, ids = foreign("llama", "softpick"), tokens(1, 12)
    expected = reference(model, "softpick")(ids, output_attentions=True).attentions
    output = model(ids, output_attentions=True)
    for ours, theirs in zip(output.attentions, expected, strict=True):
        close(ours, theirs, atol=1e-3)
    assert model(ids).attentions is None


def test_attention_can_be_set_on_a_loaded_model():
    model, ids = foreign("llama", "eager"), tokens(1, 12)
    softmax = model(ids).logits
    model.set_attn_implementation("softpick")
    close(model(ids).logits, foreign("llama", "softpick")(ids).logits)
    assert (model(ids).logits - softmax).abs().max() > 0.1
    model.set_attn_implementation("softmax")
    close(model(ids).logits, softmax, atol=1e-3)


def test_boolean_4d_masks_are_honoured_and_additive_ones_refused():
    model, ids = foreign("llama", "softpick"), tokens(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    close(model(ids, attention_mask=mask).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"(?s)torch.float32.*torch.bool.*additive"):
        model(ids, attention_mask=torch.zeros(1, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min))


GPT_OSS = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 6}, "Gemma2Attention uses softcap"),
        ("gpt_oss", GPT_OSS, "s_aux.*sinks"),
        ("llama", {"is_causal": False}, "not causal"),
        ("gemma", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(family, changes, message, masked):
    model, ids = foreign(family, "softpick", **changes), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask if masked else None)


def test_gemma2_without_its_softcap_runs(reference):
    changes = {"query_pre_attn_scalar": 8, "sliding_window": 6, "attn_logit_softcapping": None}
    model, ids = foreign("gemma2", "softpick", **changes), tokens(1, 20)
    close(model(ids).logits[0], logits_of(reference(model, "softpick"), ids[0]), atol=1e-3)


def test_encoders_are_refused():
    config = CONFIG_MAPPING["bert"](**{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")})
    model = AutoModel.from_config(config, attn_implementation="softpick").eval()
    with pytest.raises(ValueError, match="BertSelfAttention is not causal"):
        model(tokens(1, 8))


def test_position_bias_is_refused():
    config = CONFIG_MAPPING["t5"](vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = AutoModel.from_config(config, attn_implementation="softpick").eval()
    with pytest.raises(ValueError, match="position_bias"):
        model(input_ids=tokens(1, 8), decoder_input_ids=tokens(1, 8))


@pytest.mark.parametrize(
    "argument", ["indices", "block_indices", "sinks", "position_bias", "softcap", "s_aux", "cache"]
)
def test_arguments_that_change_the_attention_are_refused_by_name(argument):
    """Some models hand a choice of keys or extra logits to the attention function; dropping them would be silent."""
    from transformers import AttentionInterface

    attention = AttentionInterface()["softpick"]
    q, module = torch.randn(1, 2, 4, 8), torch.nn.Module()
    attention(module, q, q, q, None, scaling=1.0, **{argument: None})
    with pytest.raises(ValueError, match=argument if argument != "cache" else "paged cache"):
        attention(module, q, q, q, None, scaling=1.0, **{argument: torch.ones(1)})


@pytest.mark.parametrize("name", ["scaled_softpick", "scaled_softmax"])
def test_scaled_names_need_our_model(name):
    with pytest.raises(ValueError, match=f"LlamaAttention.*{name}.*SoftpickForCausalLM"):
        foreign("llama", name)(tokens(1, 5))


def test_attention_dropout_is_honoured():
    model, ids = foreign("llama", "softpick", attention_dropout=0.5), tokens(1, 12)
    quiet = model(ids).logits
    assert torch.equal(model(ids).logits, quiet)
    assert not torch.equal(model.train()(ids).logits, quiet)
