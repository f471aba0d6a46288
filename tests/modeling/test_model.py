"""The model against a float64 Llama written out by hand, and as a stand-in for LlamaForCausalLM."""

import pytest
import torch
from tiny_softpick import (
    IMPLEMENTATIONS,
    NORMALIZERS,
    SIZES,
    assert_same_gradients,
    close,
    double_parameters,
    oracle,
    oracle_loss,
    tiny_config,
    tiny_model,
    tokens,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hf_softpick import SoftpickConfig, SoftpickForCausalLM


def llama_like(model) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, attn_implementation="eager", tie_word_embeddings=model.config.tie_word_embeddings)
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_logits_loss_and_gradients_are_those_of_the_formulas(normalizer, key_heads):
    """Both implementations against the oracle; 80 tokens, so that the tiled form crosses a block of queries."""
    model = tiny_model(normalizer, num_key_value_heads=key_heads)
    ids = tokens(2, 80)
    parameters = double_parameters(model)
    expected_logits = torch.stack([oracle(parameters, model.config, row)[0] for row in ids])

    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        output = model(ids, labels=ids)
        close(output.logits, expected_logits)
        retained = oracle_loss(parameters, model.config, list(ids))
        assert_same_gradients(model, output.loss, parameters, retained)


def test_normalizers_are_told_apart():
    """Guards the test above: with scores near 0 every normalizer would pass for every other."""
    ids = tokens(1, 40)
    logits = [tiny_model(normalizer)(ids).logits for normalizer in NORMALIZERS]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_parameters_are_llamas(normalizer, tied):
    ours = SoftpickForCausalLM(tiny_config(normalizer, tie_word_embeddings=tied))
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    scales = {f"model.layers.{i}.self_attn.head_scale" for i in (0, 1)} if normalizer.startswith("scaled_") else set()
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    assert {name: s for name, s in shapes.items() if name not in scales} == {
        name: p.shape for name, p in llama.named_parameters()
    }
    assert set(shapes) - {name for name, _ in llama.named_parameters()} == scales
    assert set(dict(ours.named_buffers())) == set(dict(llama.named_buffers()))
    for name in scales:
        assert shapes[name] == (4,)


@pytest.mark.parametrize("implementation", ["auto", "eager", "tiled", "sdpa"])
def test_softmax_is_llama(implementation):
    """Same weights, same logits, loss and gradients, plain and with padding, in training mode too."""
    model = tiny_model("softmax", implementation).train()
    llama = llama_like(model).train()
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for arguments in ({}, {"attention_mask": mask}):
        real = arguments.get("attention_mask", torch.ones_like(ids)).bool()
        labels = ids.masked_fill(~real, -100)
        labels[0, 7] = -100  # predicted by a padding row, which sees nothing here and everything in Llama
        ours, theirs = model(ids, labels=labels, **arguments), llama(ids, labels=labels, **arguments)
        close(ours.logits[real], theirs.logits[real])
        model.zero_grad(), llama.zero_grad()
        ours.loss.backward(), theirs.loss.backward()
        for (name, p), q in zip(model.named_parameters(), llama.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_loss_is_divided_by_num_items_in_batch():
    """Trainer relies on it for gradient accumulation; a model that drops the keyword multiplies its gradients."""
    model, ids = tiny_model(), tokens(2, 10)
    plain = model(ids, labels=ids).loss
    assert model.accepts_loss_kwargs if hasattr(model, "accepts_loss_kwargs") else True
    close(model(ids, labels=ids, num_items_in_batch=36).loss, plain / 2)


def test_auto_is_the_default_and_runs_tiled():
    torch.manual_seed(0)
    model = SoftpickForCausalLM(tiny_config())
    ids = tokens(1, 30)
    assert model.config._attn_implementation == "auto"
    auto = model(ids).logits
    model.set_attn_implementation("tiled")
    assert torch.equal(model(ids).logits, auto)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_never_changes_rows_before_it(implementation):
    model, ids = tiny_model(implementation=implementation), tokens(1, 70)
    changed = ids.clone()
    changed[0, 40] = (ids[0, 40] + 1) % 64
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("implementation", ["auto", "eager", "tiled"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_output_attentions_is_a_call_argument(normalizer, implementation):
    model, ids = tiny_model(normalizer, implementation), tokens(2, 12)
    output = model(ids, output_attentions=True)
    assert len(output.attentions) == 2
    for row, document in enumerate(ids):
        for ours, expected in zip(
            output.attentions, oracle(double_parameters(model), model.config, document)[1], strict=True
        ):
            close(ours[row], expected)
    plain = model(ids)
    assert plain.attentions is None
    close(plain.logits, output.logits)


def test_hidden_states_are_recorded():
    output = tiny_model()(tokens(1, 6), output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [(1, 6, 32)] * 3


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softmax"])
def test_gradient_checkpointing_changes_no_gradient(normalizer, implementation, reentrant):
    model, ids = tiny_model(normalizer, implementation).train(), tokens(2, 24)
    position_ids = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    model(ids, labels=ids, position_ids=position_ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids, position_ids=position_ids).loss.backward()
    assert len(calls) == 2, "the layer was not computed again in the backward pass"
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_attention_implementation_can_be_set():
    model, ids = tiny_model(implementation="tiled"), tokens(1, 9)
    tiled = model(ids)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    close(model(ids).logits, tiled.logits)
    model.set_attn_implementation("softpick")  # the name that a saved config carries
    assert torch.equal(model(ids).logits, tiled.logits)


@pytest.mark.parametrize("name", ["flash", "scaled_softpick", "softmax", "eagre"])
def test_setting_another_attention_is_refused_and_changes_nothing(name):
    model, ids = tiny_model(), tokens(1, 9)
    before = model(ids).logits
    with pytest.raises(ValueError, match=name):
        model.set_attn_implementation(name)
    assert torch.equal(model(ids).logits, before)


def test_attention_dropout_runs_in_eager_and_is_refused_by_tiled():
    model, ids = tiny_model(implementation="eager", attention_dropout=0.5), tokens(1, 12)
    quiet = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, quiet)
    model.set_attn_implementation("tiled")
    with pytest.raises(ValueError, match="attention_dropout.*eager"):
        model(ids)
    assert model.eval()(ids).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_half_precision_stays_near_the_formulas(normalizer, dtype):
    model, ids = tiny_model(normalizer), tokens(1, 40)
    exact = oracle(double_parameters(model), model.config, ids[0])[0]
    model.to(dtype)
    for implementation in IMPLEMENTATIONS:
        model.set_attn_implementation(implementation)
        logits = model(ids).logits
        assert logits.dtype == dtype
        error = (logits[0].double() - exact).norm() / exact.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_autocast_runs_both_implementations():
    """What accelerate's mixed precision does: float32 parameters, bfloat16 products."""
    ids = tokens(1, 20)
    for normalizer in NORMALIZERS:
        model = tiny_model(normalizer)
        exact = model(ids).logits
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(ids, labels=ids)
            output.loss.backward()
            assert (output.logits.float() - exact).norm() / exact.norm() < 0.1
            assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_inputs_embeds_stand_for_tokens():
    model, ids = tiny_model(), tokens(2, 8)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": "softpik"}, "'softpik'.*softpick, softmax"),
        ({"sliding_window": 1}, "sliding_window is 1.*at least 2"),
        ({"is_causal": False}, "causal only"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*longest row of a batch"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'.*longest row of a batch"),
    ],
)
def test_configuration_is_checked(changes, message):
    with pytest.raises(Exception, match=message):
        SoftpickConfig(**{**SIZES, **changes})
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)  # as from_pretrained(..., rope_parameters=...) does
    with pytest.raises(Exception, match=message):
        SoftpickForCausalLM(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_document_does_not_depend_on_its_company(rope):
    """Whatever rotates: not on a longer row in the batch, and not on the calls before."""
    model = tiny_model(max_position_embeddings=32, rope_parameters={"rope_theta": 100.0, **rope})
    ids = tokens(1, 20)
    alone = model(ids).logits
    company = model(torch.cat([torch.nn.functional.pad(ids, (0, 60)), tokens(1, 80)])).logits
    close(company[0, :20], alone[0])
    assert torch.equal(model(ids).logits, alone)


def test_biases_are_llamas_too():
    model = tiny_model("softmax", attention_bias=True, mlp_bias=True)
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, attn_implementation="eager")
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    ids = tokens(1, 10)
    close(model(ids).logits, llama(ids).logits)
