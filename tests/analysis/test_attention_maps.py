"""Displayed maps against a Llama in plain float64 formulas, on our models and foreign ones."""

import copy

import pytest
import torch
from tiny_softpick import SIZES, double_parameters, oracle, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_softpick.analysis.attention_maps import attention_maps
from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.errors import CheckpointError, DataError, RecipeError

TEXT = " ".join(f"w{i}" for i in (5, 9, 5, 40, 33, 7, 61, 12, 9, 8, 30, 31))


def loaded(model):
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LoadedModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), "m", "m", None, False)


def expected(model, text=TEXT):
    ids = torch.tensor([int(word[1:]) for word in text.split()])
    return torch.stack(oracle(double_parameters(model), model.config, ids)[1]).detach()


def dense(item):
    size = len(item["weights"])
    full = torch.zeros(size, size, dtype=torch.float64)
    for i, row in enumerate(item["weights"]):
        assert len(row) == i + 1
        full[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return full


@pytest.mark.parametrize("implementation", ["tiled", "eager"])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax", "scaled_softpick"])
def test_maps_are_those_of_the_model(normalizer, implementation):
    model = tiny_model(normalizer, implementation)
    weights = expected(model)
    found = attention_maps(loaded(model), TEXT, heads=[(0, 3), (1, 0)])
    assert found["tokens"] == TEXT.split() and not found["cut"] and found["chosen_by"] == "given"
    assert [(item["layer"], item["head"]) for item in found["maps"]] == [(0, 3), (1, 0)]
    for item in found["maps"]:
        truth = weights[item["layer"], item["head"]]
        torch.testing.assert_close(dense(item), truth, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(item["row_mass"]).double(), truth.sum(-1), atol=2e-5, rtol=1e-3)
        assert item["first_mass"] == pytest.approx(truth[:, 0].mean().item(), rel=1e-3)
        zeros = sum(w == 0 for row in item["weights"] for w in row)
        assert zeros == (truth == 0).sum().item() - 12 * 11 // 2  # exact zeros stay exact, others do not become 0
        assert (zeros > 0) == ("softpick" in normalizer)


def test_the_head_with_the_largest_sink_is_shown_first():
    model = tiny_model("softmax")
    first = expected(model)[..., 0].mean(-1).flatten()
    found = attention_maps(loaded(model), TEXT)
    places = [item["layer"] * 4 + item["head"] for item in found["maps"]]
    assert found["chosen_by"] == "this text" and places[0] == first.argmax().item()
    assert (first > first[places[1]]).sum() == 4  # the median of 8


def test_statistics_choose_the_heads_where_there_are_any():
    model = tiny_model()
    layers = [{"heads": {"first_mass": [0.1, 0.2, 0.3, "nan"]}}, {"heads": {"first_mass": [0.4, 0.9, 0.5, 0.6]}}]
    found = attention_maps(loaded(model), TEXT, statistics={"layers": layers})
    assert (found["maps"][0]["layer"], found["maps"][0]["head"]) == (1, 1) and found["chosen_by"] == "statistics.json"
    with pytest.raises(CheckpointError, match="Measure again"):
        attention_maps(loaded(model), TEXT, statistics={"layers": layers[:1]})


@pytest.mark.parametrize("implementation", ["sdpa", "softpick"])
def test_foreign_models_show_theirs(implementation):
    config = LlamaConfig(**{**SIZES, "rope_parameters": None})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    reference = copy.deepcopy(model)
    if implementation == "sdpa":
        reference.set_attn_implementation("eager")
    ids = torch.tensor([[int(word[1:]) for word in TEXT.split()]])
    with torch.no_grad():
        truth = reference(ids, output_attentions=True).attentions[1][0, 2].double()
    (item,) = attention_maps(loaded(model), TEXT, heads=[(1, 2)])["maps"]
    torch.testing.assert_close(dense(item), truth, atol=1e-6, rtol=1e-3)
    mass = torch.tensor(item["row_mass"])
    assert (mass < 0.99).any() if implementation == "softpick" else torch.allclose(mass, torch.ones(12), atol=1e-3)


def test_long_texts_are_cut_and_wrong_wishes_named():
    model = tiny_model()
    found = attention_maps(loaded(model), TEXT, max_tokens=5)
    assert found["cut"] and len(found["tokens"]) == 5
    with pytest.raises(RecipeError, match="no head 2.0: layers are 0 to 1, heads 0 to 3"):
        attention_maps(loaded(model), TEXT, heads=[(2, 0)])
    with pytest.raises(DataError, match="1 tokens"):
        attention_maps(loaded(model), "w1")
