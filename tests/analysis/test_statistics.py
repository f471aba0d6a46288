"""Streaming statistics against dense float64 maps of the same models, ours and those of transformers."""

import pytest
import torch
from dense_statistics import activations, attention, documents, tiles
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_softpick import SoftpickConfig, SoftpickForCausalLM
from hf_softpick.analysis.attention_rows import AttentionRows
from hf_softpick.analysis.attention_statistics import AttentionStatistics, documents_of
from hf_softpick.analysis.statistics import ModelStatistics, measure
from hf_softpick.analysis.watching import watch
from hf_softpick.modeling.normalizers import NORMALIZERS
from hf_softpick.modeling.visibility import visible_keys

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GQA = dict(num_key_value_heads=2)
MIN_SINK = 12
LENGTH = 70  # more than one tile of 64, no multiple of anything


def _ours(normalizer, **extra):
    return SoftpickForCausalLM(SoftpickConfig(**SIZES, **GQA, normalizer=normalizer, **extra))


OTHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **GQA)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "gemma2 (softcap, window)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **GQA, head_dim=8, sliding_window=20, attn_logit_softcapping=2.0)
    ),
    "gemma3 (window)": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, **GQA, head_dim=8, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "gpt_oss (sinks, mixture of experts)": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, **GQA, head_dim=8, sliding_window=20, num_local_experts=2, num_experts_per_tok=1)
    ),
}


def _batch(case):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, LENGTH), generator=generator)
    inputs = {"input_ids": ids}
    if case == "packed":
        cuts = [torch.cat([torch.arange(30), torch.arange(5), torch.arange(LENGTH - 35)]), torch.arange(LENGTH)]
        inputs["position_ids"] = torch.stack(cuts)
    elif case in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 23) if case == "left" else slice(LENGTH - 23, None)] = 0
        inputs["attention_mask"] = mask
    return inputs


def _sharpen(model, factor=40.0):
    """Larger projections than at initialisation, so that the weights differ from each other."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj.weight", "k_proj.weight", "query_key_value.weight")):
                parameter.mul_(factor**0.5)
            if name.endswith(("self_attn.sinks", "attn.sinks")):
                parameter.normal_()
    return model


def _dense(model, inputs):
    """Maps and outputs of an eager forward pass, by layer, in float64."""
    model.set_attn_implementation("eager")
    outputs = {"attention": [], "mlp": []}
    handles = []
    backbone = model.base_model
    for layer in backbone.layers:
        attention_module = getattr(layer, "self_attn", None) or layer.attention

        def keep(part):
            return lambda module, args, out: outputs[part].append(out[0] if isinstance(out, tuple) else out)

        handles += [
            attention_module.register_forward_hook(keep("attention")),
            layer.mlp.register_forward_hook(keep("mlp")),
        ]
    hidden = []
    handles += [
        layer.register_forward_hook(lambda m, a, o: hidden.append(o[0] if isinstance(o, tuple) else o))
        for layer in backbone.layers
    ]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    outputs = {part: [each.double() for each in values] for part, values in {"hidden": hidden, **outputs}.items()}
    return [weights.double() for weights in maps], outputs


def _visible(inputs, window):
    mask = inputs.get("attention_mask")
    keys, _ = visible_keys(
        LENGTH,
        LENGTH,
        torch.device("cpu"),
        padding_mask=None if mask is None else mask.bool(),
        position_ids=inputs.get("position_ids"),
        sliding_window=window,
    )
    return keys.dense(LENGTH, LENGTH)[:, 0].expand(2, -1, -1)


def _check(model, inputs, windows=(None, None), tolerance=1e-10):
    statistics = measure(model, [inputs], MIN_SINK)
    result = statistics.result()
    mask = inputs.get("attention_mask")
    parts = documents(inputs.get("position_ids"), mask, (2, LENGTH))
    maps, outputs = _dense(model, inputs)
    alphas = {"alphas": [], "alphas4": [], "alphas_top": []}
    for layer, weights in enumerate(maps):
        expected = attention(weights, _visible(inputs, windows[layer]), parts, MIN_SINK)
        got = result["layers"][layer]["heads"]
        for name in expected:
            if name in alphas:
                alphas[name] += [alpha for head in expected[name] for alpha in head]
            elif name == "positions":
                for head, positions in enumerate(expected[name]):
                    assert got["top_position"][head] in positions
            else:
                assert got[name] == pytest.approx(expected[name], abs=tolerance, rel=tolerance), (layer, name)
        for part, values in outputs.items():
            rows = [values[layer][row][columns] for row, columns in _rows_of(parts)]
            expected = activations(rows)
            for name, value in expected.items():
                assert result["layers"][layer][part][name] == pytest.approx(value, rel=10 * tolerance), (
                    layer,
                    part,
                    name,
                )
    for kind, name in (("first", "alphas"), ("first4", "alphas4"), ("any", "alphas_top")):
        for epsilon in (0.1, 0.2, 0.3, 0.5):
            share = sum(alpha > epsilon for alpha in alphas[name]) / len(alphas[name])
            assert result["sink_rate"][kind][str(epsilon)] == pytest.approx(share), (kind, epsilon)
    assert result["data"]["sequences"] == len(parts)
    assert result["data"]["tokens"] == sum(len(columns) for _, columns in parts)
    assert result["nonfinite"] == []
    return result


def _rows_of(parts):
    rows = {}
    for row, columns in parts:
        rows.setdefault(row, []).extend(columns)
    return rows.items()


@pytest.mark.parametrize("case", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_our_normalizers(normalizer, case):
    torch.manual_seed(0)
    model = _sharpen(_ours(normalizer)).double().eval()
    model.set_attn_implementation("tiled")
    result = _check(model, _batch(case))
    sparse = result["summary"]["sparsity"]
    assert sparse == 0 if "softmax" == normalizer else normalizer == "scaled_softmax" or 0.2 < sparse < 0.8


@pytest.mark.parametrize("case", ["plain", "packed", "left"])
def test_a_window(case):
    torch.manual_seed(0)
    model = _sharpen(_ours("softpick", sliding_window=20)).double().eval()
    _check(model, _batch(case), (20, 20))


@pytest.mark.parametrize("case", ["plain", "packed", "left"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family, case):
    torch.manual_seed(0)
    model = _sharpen(OTHERS[family]()).eval()  # float32: their eager softmax is, and its masks overflow in float64
    windows = (20, None) if "window" in family or "sinks" in family else (None, None)
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not model._supports_sdpa:
            continue
        model.set_attn_implementation(implementation)
        if case == "packed" and "sinks" in family:
            with pytest.raises(ValueError, match="GptOssForCausalLM lets packed documents see each other"):
                measure(model, [_batch(case)])
        else:
            _check(model, _batch(case), windows, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_other_families_with_softpick(family):
    """The same pass through our names in the registry, which get None as mask."""
    torch.manual_seed(0)
    model = _sharpen(OTHERS[family]()).double().eval()
    inputs = _batch("packed")
    model.set_attn_implementation("softpick")
    result = measure(model, [inputs], MIN_SINK).result()
    maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    parts = documents(inputs["position_ids"], None, (2, LENGTH))
    for layer, weights in enumerate(maps):
        expected = attention(weights.detach().double(), _visible(inputs, None), parts, MIN_SINK)
        for name in ("first_mass", "row_mass", "sparsity", "entropy", "distance"):
            assert result["layers"][layer]["heads"][name] == pytest.approx(expected[name], abs=1e-9), name


@pytest.mark.parametrize("implementation", ["auto", "eager", "tiled", "sdpa"])
def test_every_implementation_gives_the_same(implementation):
    """In float32: to rounding, whatever computes the model itself."""
    torch.manual_seed(0)
    model = _sharpen(_ours("softmax")).eval()
    inputs = _batch("packed")
    model.set_attn_implementation("eager")
    expected = measure(model, [inputs], MIN_SINK).summary()
    model.set_attn_implementation(implementation)
    assert measure(model, [inputs], MIN_SINK).summary() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_tiles_without_a_positive_score():
    """Against the scores themselves, on rows where whole tiles are negative."""
    from hf_softpick.analysis.attention_rows import AttentionCall, attention_rows

    generator = torch.Generator().manual_seed(0)
    query = torch.rand(2, 4, 200, 8, generator=generator, dtype=torch.float64) - 0.15
    key = -torch.rand(2, 2, 200, 8, generator=generator, dtype=torch.float64)
    key[:, :, 130:190] *= -1
    key[:, :, 64:128] = 0.0  # a score of exactly 0 is not positive
    position = torch.stack([torch.arange(200), torch.cat([torch.arange(90), torch.arange(110)])])
    visible, _ = visible_keys(200, 200, query.device, position_ids=position)
    see = visible.dense(200, 200)[:, 0].expand(2, -1, -1)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    for normalizer in ("softpick", "softmax", "rectified_softmax"):
        for shown in (visible, visible.dense(200, 200)):
            rows = attention_rows(AttentionCall(query, key, shown, 0.3, normalizer))
            for index, size in enumerate((64, 128)):
                for head in range(4):
                    found = [tiles(scores[row, head], see[row], size) for row in range(2)]
                    assert rows.tiles[index, head] == sum(total for total, _ in found)
                    assert rows.empty_tiles[index, head] == sum(empty for _, empty in found) > 0


def _rows(mass, received, tiles):
    """AttentionRows of one sequence and two heads, from row masses [2, T] and what keys receive [2, T]."""
    length = mass.shape[1]
    index = torch.arange(length)[None, None]
    ones = torch.ones(1, 2, length)
    tiles = torch.tensor([[tiles, tiles]] * 2)
    return AttentionRows(mass[None], ones, ones, ones, received[None], index + 1, length - index, tiles, tiles // 2)


def test_ranks_add_up():
    """A head is dormant only where every sequence says so, and tiles of all ranks count."""
    quiet, busy = torch.full((2, 40), 0.001), torch.full((2, 40), 0.5)
    mixed = torch.stack([quiet[0], busy[0]])
    ranks = [AttentionStatistics() for _ in range(4)]
    with pytest.raises(ValueError, match="no batch has been added"):
        ranks[3].result()
    for rank, mass, count in zip(ranks, (quiet, mixed, mixed), (8, 2, 6), strict=False):
        rank.add(_rows(mass, mass.flip(1), count), documents_of(1, 40, None, None, "cpu"))
    ranks[0].tiles[1] = 8  # all of its tiles are empty
    for other in ranks[1:]:
        ranks[0].merge(other)
    result = ranks[0].result()
    assert result["dormant"] == [True, False]
    assert result["empty_tiles_64"] == result["empty_tiles_128"] == [(8 + 1 + 3) / 16] * 2
    assert result["row_mass"] == pytest.approx([0.001, (0.001 + 0.5 + 0.5) / 3])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_no_document(padding):
    """generate() gives padding positions of its own, 0 or 1; they begin nothing."""
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    real = real if padding == "left" else real.flip(1)
    position = (real.cumsum(-1) - 1).masked_fill(~real, 1)
    found = documents_of(2, 9, position, real, "cpu")
    assert found.length.tolist() == [5, 9] and found.first.tolist() == ([4, 9] if padding == "left" else [0, 9])
    assert found.index[0].tolist() == [0 if token else 2 for token in real[0].tolist()]
    assert found.position[1].tolist() == list(range(9))
    position[1, 5:] -= 5
    assert documents_of(2, 9, position, real, "cpu").length.tolist() == [5, 5, 4]


def test_packed_documents_beside_padding():
    """The same as rows without it."""
    torch.manual_seed(0)
    model = _sharpen(_ours("softpick")).double().eval()
    inputs, count = _batch("packed") | _batch("right"), LENGTH - 23
    rows = [(0, count), (1, LENGTH)]
    apart = [{name: inputs[name][[row], :end] for name in ("input_ids", "position_ids")} for row, end in rows]
    found, expected = (measure(model, batches, MIN_SINK) for batches in ([inputs], apart))
    assert found.sequences == 4 and found.summary() == pytest.approx(expected.summary(), rel=1e-9)
    assert found.sink_rates() == expected.sink_rates()


def test_batches_merge_into_the_whole():
    """Two batches, two ranks, one batch of both: the same."""
    torch.manual_seed(0)
    model = _sharpen(_ours("softpick")).double().eval()
    inputs = _batch("packed")
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
    whole = measure(model, [inputs], MIN_SINK)
    apart = measure(model, rows, MIN_SINK)
    first, second = (measure(model, [row], MIN_SINK) for row in rows)
    first.merge(second)
    for other in (apart, first):
        assert other.summary() == pytest.approx(whole.summary(), rel=1e-9)
        assert other.sink_rates() == whole.sink_rates()
    places = [statistics.result()["layers"][1]["hidden"]["largest"] for statistics in (whole, apart)]
    for name in ("row", "position", "channel"):
        assert places[0][name] == places[1][name]


def test_nan_is_named_by_layer_and_never_averaged_away():
    model = _ours("softpick").eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    statistics = measure(model, [_batch("plain")], MIN_SINK)
    assert {place["layer"] for place in statistics.nonfinite()} == {1}
    assert [place["where"] for place in statistics.nonfinite()] == ["mlp", "hidden"]
    summary = statistics.summary()
    assert summary["kurtosis"] != summary["kurtosis"] and summary["hidden_max"] != summary["hidden_max"]
    assert summary["sink_rate"] == summary["sink_rate"]  # attention saw none of it

    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("inf")
    summary = measure(model, [_batch("plain")], MIN_SINK).summary()
    for name in ("sink_rate", "sparsity", "row_mass", "entropy"):
        assert summary[name] != summary[name], name


def test_watches_that_overlap_see_their_own_model_alone():
    """As in two threads: the one that began first ends first, and its attention stays below the other's."""
    models, seen = [_ours("softpick"), _ours("softpick")], [[], []]
    watches = [
        watch(model, lambda layer, call, calls=calls: calls.append(layer), lambda *_: None)
        for model, calls in zip(models, seen, strict=True)
    ]
    run = [lambda model=model: model(**_batch("plain"), use_cache=False) for model in models]
    layers = list(range(models[0].config.num_hidden_layers))
    for each in watches:
        each.__enter__()
    run[0](), run[1]()
    watches[0].__exit__(None, None, None)
    run[0](), run[1]()
    assert seen == [layers, layers * 2]
    watches[1].__exit__(None, None, None)
    run[0](), run[1]()
    assert seen == [layers, layers * 2]


def _stop(*arguments):
    raise RuntimeError("stop here")


def test_nothing_is_left_behind():
    """Hooks and the watching attention go away, also when the forward pass fails; mode and outputs are as before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = _ours("softpick").train()
    inputs = _batch("plain")
    before = dict(ALL_ATTENTION_FUNCTIONS)
    measure(model, [inputs])
    with pytest.raises(RuntimeError, match="stop here"):
        handle = model.model.layers[1].mlp.register_forward_hook(_stop)
        measure(model, [inputs])
    handle.remove()
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_parts_stay_in_their_mode():
    model = _ours("softpick").train()
    model.model.layers[0].eval()
    measure(model, [_batch("plain")])
    assert model.training and not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training


def test_what_cannot_be_measured_is_refused_by_name():
    model = _ours("softpick")
    with pytest.raises(ValueError, match="beyond the model's 61"):
        measure(model, [{"input_ids": torch.full((1, 4), 61)}])
    with pytest.raises(ValueError, match="70 tokens, the model reads 64"):
        measure(_ours("softpick", max_position_embeddings=64), [_batch("plain")])
    with pytest.raises(ValueError, match="no token"):
        measure(model, [])
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="no list of layers"):
        measure(mamba, [_batch("plain")])
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM.*attention interface"):
        measure(bloom, [_batch("plain")])


def test_the_hub_copy_of_the_code_is_seen(tmp_path):
    """A checkpoint loaded with trust_remote_code has classes and an attention of its own."""
    from transformers import AutoModelForCausalLM

    model = _ours("softpick").eval()
    model.save_pretrained(tmp_path)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    copy = get_class_from_dynamic_module("modeling_softpick.SoftpickForCausalLM", str(tmp_path))
    assert copy is not SoftpickForCausalLM and AutoModelForCausalLM is not None
    remote = copy.from_pretrained(tmp_path).eval()
    inputs = _batch("packed")
    assert measure(remote, [inputs]).summary() == measure(model, [inputs]).summary()


def test_layers_must_stay():
    statistics = ModelStatistics(3)
    with pytest.raises(ValueError, match="2 layers, expected 3"):
        statistics.add(_ours("softpick"), _batch("plain"))
