"""What is read of transformers' mask functions, against what they compute; on its oldest and newest version."""

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface, LlamaConfig, masking_utils

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
