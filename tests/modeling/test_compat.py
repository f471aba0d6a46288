"""Every private name of another library that the package touches; runs on the oldest and newest supported versions."""

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface, LlamaConfig, PreTrainedConfig, PreTrainedModel, masking_utils

from hf_softpick.modeling import compat
from hf_softpick.modeling.compat import MaskParts, mask_parts

LENGTH, WINDOW = 9, 3
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2, 2, 2]])


@pytest.fixture
def handed(monkeypatch):
    """The mask functions that were handed to the registered attention "recording"."""
    functions = []
    registered = dict(AttentionMaskInterface._global_mapping)
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", registered)
    AttentionMaskInterface.register("recording", lambda mask_function, **kwargs: functions.append(mask_function))
    return functions


def _create(kind, handed, **kwargs):
    """The function that transformers' `kind` hands over."""
    config = LlamaConfig(sliding_window=WINDOW, attention_chunk_size=4, attn_implementation="recording")
    embeds = torch.zeros(2, LENGTH, 4)
    given = {"attention_mask": None, "past_key_values": None, **kwargs}
    getattr(masking_utils, f"create_{kind}_mask")(config=config, inputs_embeds=embeds, **given)
    return handed[-1]


def _dense(function, length=LENGTH):
    index = torch.arange(length)
    return function(torch.arange(2)[:, None, None, None], 0, index[:, None], index).expand(2, 1, length, length)


def _dense_of(parts, length=LENGTH):
    index = torch.arange(length)
    mask = (index <= index[:, None]).expand(2, 1, length, length)
    if parts.window is not None:
        mask = mask & (index > index[:, None] - parts.window)
    if parts.documents is not None:
        mask = mask & (parts.documents[:, None, :, None] == parts.documents[:, None, None, :])
    return mask


@pytest.mark.parametrize("kind, window", [("causal", None), ("sliding_window_causal", WINDOW)])
@pytest.mark.parametrize("positions", [None, PACKED, PACKED[:1]], ids=["plain", "packed", "one row of positions"])
def test_what_transformers_hands_over_is_read(handed, kind, window, positions):
    function = _create(kind, handed, position_ids=positions)
    parts = mask_parts(function)
    assert parts.window == window
    if positions is None:
        assert parts.documents is None
    else:
        assert torch.equal(parts.documents, DOCUMENTS if len(positions) == 2 else DOCUMENTS[:1].expand(2, -1))
    assert torch.equal(_dense_of(parts), _dense(function))


def test_rows_of_one_document_are_not_packed(handed):
    assert mask_parts(_create("causal", handed, position_ids=torch.arange(LENGTH)[None] + 5)) == MaskParts()


@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal"])
@pytest.mark.parametrize("argument", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])
def test_a_function_of_the_users_own_is_not_read(handed, kind, argument, positions):
    function = _create(kind, handed, position_ids=positions, **{argument: lambda batch, head, q, k: k < q})
    assert mask_parts(function) is None


@pytest.mark.parametrize("kind", ["chunked_causal", "bidirectional", "bidirectional_sliding_window"])
def test_other_masks_are_not_read(handed, kind):
    assert mask_parts(_create(kind, handed)) is None


def test_blocks_are_not_read(handed):
    ids = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]]).expand(2, -1)
    assert mask_parts(_create("causal", handed, block_sequence_ids=ids)) is None


def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
    """Named as transformers names its own."""
    return kv_idx > q_idx - 2


def _overlay(sliding_window):
    """As transformers' sliding_window_overlay, with other code."""

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx >= q_idx - sliding_window

    return inner_mask


_causal, _and = masking_utils.causal_mask_function, masking_utils.and_masks
_packed, _sliding = masking_utils.packed_sequence_mask_function, masking_utils.sliding_window_overlay


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: k <= q,
        inner_mask,
        _sliding(WINDOW),
        _packed(DOCUMENTS),
        _and(_overlay(WINDOW), _causal),
        _and(inner_mask, _causal),
        _and(_sliding(WINDOW), inner_mask),
        _and(_sliding(WINDOW), _packed(DOCUMENTS)),
        _and(_packed(DOCUMENTS), _packed(DOCUMENTS)),
        _and(_sliding(WINDOW), _causal, inner_mask),
        _and(_causal),
        _and(_sliding(torch.tensor(WINDOW)), _causal),
        _and(_sliding(0), _causal),
        masking_utils.or_masks(_sliding(WINDOW), _causal),
        _and(masking_utils.padding_mask_function(DOCUMENTS > 0), _causal),
        _and(masking_utils.packed_sequence_mask_function(DOCUMENTS.flip(-1)), _causal),  # they come back, or may
        masking_utils.add_offsets_to_mask_function(_causal, 1, 0),
        nn.Identity(),
    ],
)
def test_look_alikes_are_not_read(function):
    assert mask_parts(function) is None


def test_positions_that_belong_to_other_documents_are_not_read():
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        pytest.skip("this transformers tells mask functions of columns")
    packed = masking_utils.packed_sequence_compatibility_function
    assert mask_parts(packed(_causal, PACKED, DOCUMENTS)) == MaskParts(None, DOCUMENTS)
    wrong = PACKED.clone()
    wrong[0, 2:4] = torch.tensor([3, 2])
    assert mask_parts(packed(_causal, wrong, DOCUMENTS)) is None
    assert mask_parts(packed(inner_mask, PACKED, DOCUMENTS)) is None
    assert mask_parts(packed(_causal, PACKED[:1], DOCUMENTS)) is None


def test_functions_that_changed_are_not_read(monkeypatch):
    """As a later transformers might: the window would be one key too wide."""
    masks_are_as_read = compat._masks_are_as_read.__wrapped__
    assert masks_are_as_read()
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", _overlay)
    assert not masks_are_as_read()
    monkeypatch.setattr(compat, "_masks_are_as_read", masks_are_as_read)
    assert mask_parts(masking_utils.sliding_window_causal_mask_function(WINDOW)) is None
    assert mask_parts(_causal) == MaskParts()


@pytest.mark.parametrize("positions", [None, PACKED], ids=["plain", "packed"])
def test_masks_are_read_inside_a_graph_only_if_plain(positions):
    """Dynamo has no closures of functions made in the graph; there must be no break either."""
    read = []
    config = LlamaConfig(attn_implementation="recording")
    AttentionMaskInterface.register(
        "recording", lambda mask_function, **kwargs: read.append(mask_parts(mask_function))
    )

    def create(embeds, position_ids):
        masking_utils.create_causal_mask(config, embeds, None, None, position_ids)
        return embeds + 1

    try:
        torch.compile(create, backend="eager", fullgraph=True)(torch.zeros(2, LENGTH, 4), positions)
    finally:
        del AttentionMaskInterface._global_mapping["recording"]
    assert read == [MaskParts() if positions is None else None]


def test_attention_of():
    config = LlamaConfig()
    assert compat.attention_of(config) is None
    assert compat.attention_of(LlamaConfig(attn_implementation="eager")) == "eager"


def test_has_mask_function(handed):
    assert compat.has_mask_function("recording") and compat.has_mask_function("sdpa")
    assert not compat.has_mask_function("nobody") and not compat.has_mask_function(None)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["here"] = print  # transformers does not ask for its masks either
    try:
        assert not compat.has_mask_function("here")
    finally:
        del masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["here"]


def test_decomposition():
    @torch.library.custom_op("softpick_test_compat::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    @compat.decomposition(twice)
    def _(x):
        return x + x

    class Model(nn.Module):
        def forward(self, x):
            return twice(x)

    program = torch.export.export(Model(), (torch.ones(2),))
    assert "softpick_test_compat" in str(program.graph)
    assert "softpick_test_compat" not in str(program.run_decompositions(torch._decomp.decomposition_table).graph)


@pytest.mark.parametrize("compiled", [False, True])
def test_assert_async(compiled):
    def check(x):
        compat.assert_async((x > 0).all(), "not above zero")
        return x + 1

    check = torch.compile(check, backend="eager", fullgraph=True) if compiled else check
    check(torch.ones(2))
    with pytest.raises(RuntimeError, match="not above zero"):
        check(torch.zeros(2))


def test_dispatch_mode():
    seen = []

    class Watch(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).softmax(0)
    assert "aten::_softmax" in seen


class _Own:
    def method(self, x):
        return x + 1

    @classmethod
    def built(cls, x):
        return cls, x


def test_hook():
    """Once, with the original, for methods and class methods, also from a subclass."""

    class Sub(_Own):
        pass

    compat.hook(_Own, "method", lambda original, self, x: original(self, x) * 10)
    compat.hook(_Own, "method", lambda original, self, x: 1 / 0)
    compat.hook(_Own, "built", lambda original, cls, x: (*original(cls, x), "hooked"))
    assert Sub().method(1) == 20 and _Own.method.__name__ == "method"
    assert Sub.built(3) == (Sub, 3, "hooked")


def test_the_places_of_the_guard(tmp_path):
    """transformers writes, reads and chooses there, and has no second way."""
    for owner, name in (compat.WRITES_CONFIG, compat.READS_CONFIG, *compat.CHOOSES_ATTENTION):
        assert name in owner.__dict__
    passed = []

    class Config(LlamaConfig):
        def to_json_file(self, *args, **kwargs):
            passed.append("written")
            return super().to_json_file(*args, **kwargs)

        @classmethod
        def _dict_from_json_file(cls, *args):
            passed.append("read")
            return super()._dict_from_json_file(*args)

    Config(vocab_size=8).save_pretrained(tmp_path)
    Config.from_pretrained(tmp_path)
    Config.from_json_file(tmp_path / "config.json")
    assert passed == ["written", "read", "read"]


@pytest.mark.parametrize("name", [name for _, name in compat.CHOOSES_ATTENTION])
def test_the_choice_of_an_attention(name):
    asked = []

    def choose(self, attention, *args, **kwargs):
        asked.append(attention)
        return getattr(PreTrainedModel, name)(self, attention, *args, **kwargs)

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig
        _supports_sdpa = True

    setattr(Model, name, choose)
    model = Model(PreTrainedConfig())
    model.set_attn_implementation("eager")
    assert asked[0] is None and asked[-1] == "eager" and compat.attention_of(model.config) == "eager"
