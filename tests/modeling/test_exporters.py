"""torch.export, ONNX and transformers' exporters: programs that compute what the model does, at other lengths."""

import numpy as np
import pytest
import torch
from tiny_softpick import tiny_model, tokens
from torch.export import Dim
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_softpick  # noqa: F401  registers the attention names

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ATOL = 1e-5


def padded(batch, length, *pads):
    """Tokens and a mask with that many padded tokens at the left of each row."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return {"input_ids": tokens(batch, length, seed=length), "attention_mask": mask}


def foreign_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="softpick").eval()


@pytest.mark.parametrize("make", [lambda: tiny_model("scaled_softpick"), foreign_model], ids=["ours", "llama"])
def test_onnx(make):
    """The operators of the tiled attention are unknown to ONNX: a dense form of them is written."""
    model = make()
    dynamic = {name: {0: Dim("batch"), 1: Dim("length")} for name in ("input_ids", "attention_mask")}
    program = torch.onnx.export(
        model,
        (),
        kwargs={**padded(2, 8, 3), "use_cache": False},
        dynamic_shapes={**dynamic, "use_cache": None},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    given = padded(3, 13, 0, 6, 2)
    logits = torch.from_numpy(session.run(None, {name: np.asarray(x) for name, x in given.items()})[0])
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits[real], model(**given).logits[real], atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("backend", ["dynamo", "onnx"])
@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache])
def test_transformers_exporters(backend, cache):
    """Packed rows without a cache, one token after a left-padded prompt with one, both at lengths of their own.

    The batch of a StaticCache is fixed by transformers' description of it.
    """
    from transformers import exporters

    if old := not hasattr(exporters, "ModelRunner"):  # 5.17
        if backend == "onnx":
            pytest.skip("torch.where(condition, tensor, number) does not pass the OnnxExporter of transformers 5.17")

    model = tiny_model()
    name = {"dynamo": "Dynamo", "onnx": "Onnx"}[backend]
    exporter = getattr(exporters, f"{name}Exporter")()
    config = getattr(exporters, f"{name}Config")(dynamic=True)

    def inputs(batch, length, **sizes):
        given = padded(batch, length, 3)
        if cache is None:
            position = torch.arange(length).expand(batch, -1) % (length // 2)
            return {"input_ids": given["input_ids"], "position_ids": position, "use_cache": False}
        past = cache(config=model.config, **sizes)
        prompt = {key: x[:, :-1] for key, x in given.items()}
        with torch.no_grad():
            model(**prompt, past_key_values=past, use_cache=True)
        given["input_ids"] = given["input_ids"][:, -1:]
        position = given["attention_mask"].sum(-1, keepdim=True) - 1
        return {**given, "position_ids": position, "past_key_values": past, "use_cache": True}

    sizes = {"max_cache_len": 16} if cache is StaticCache else {}
    exported = exporter.export(model, inputs(2, 8, **sizes), config=config)
    if old:  # a program, which drops the arguments that are no tensors
        program = exported.module()
        exported = lambda use_cache, **given: program(**given)  # noqa: E731
    with torch.no_grad():
        batch = 2 if cache is StaticCache else 3
        expected = model(**inputs(batch, 12, **sizes)).logits
        found = exported(**inputs(batch, 12, **sizes))["logits"]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
