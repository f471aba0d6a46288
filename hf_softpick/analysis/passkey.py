"""Passkey retrieval: does a model find a number in its context, by length and depth?

Two measures. `accuracy`: greedy generation with the KV cache writes the number; chance is 0. `choice_accuracy`: the
true number is likelier after the prompt than each of a few others; chance is 1/(others + 1). It tells small models
apart that write no number.
"""

import itertools
import os.path
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig

from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.analysis.passkey_prompts import Prompt, TooShort, answer_tokens, build_prompt, encode, only_digits
from hf_softpick.errors import CheckpointError, NumericsError, RecipeError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHORTEST = 64
_BATCH_TOKENS = 32768


def trained_length(loaded: LoadedModel) -> int | None:
    """max_position_embeddings of the configuration, None where it has none."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)


def choose_lengths(loaded: LoadedModel, lengths: Sequence[int] | None, beyond: bool = False) -> list[int]:
    """Lengths to measure, in tokens: `lengths`, or powers of two from 64 and the trained length itself.

    Raises:
        RecipeError: a length is beyond the trained one and `beyond` was not given, or none is known.
    """
    longest = trained_length(loaded)
    if lengths is None:
        if longest is None:
            raise RecipeError(f"the configuration of {loaded.path} has no max_position_embeddings. Give the lengths.")
        powers = itertools.takewhile(lambda power: power < longest, (_SHORTEST * 2**i for i in itertools.count()))
        return [*powers, longest]
    too_long = [length for length in lengths if longest is not None and length > longest]
    if too_long and not beyond:
        raise RecipeError(
            f"{loaded.name} was trained on at most {longest} tokens (max_position_embeddings); asked for "
            f"{', '.join(map(str, too_long))}. Leave them out, or give --beyond to measure them all the same."
        )
    return sorted(set(lengths))


def passkey_grid(
    loaded: LoadedModel,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    *,
    samples: int = 10,
    distractors: int = 9,
    seed: int = 0,
    beyond: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
    after_length: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure every length and depth.

    Args:
        lengths: tokens of prompt and answer together; None as `choose_lengths`.
        depths: from 0, the beginning, to 1, the end.
        samples: prompts a cell, with different numbers.
        distractors: other numbers that the choice is between.
        batch_size: prompts at once; None for what has about 32768 tokens. Halved where memory does not suffice.
        after_length: called with the result so far, to save it.

    Returns:
        lengths, depths, accuracy and choice_accuracy [lengths, depths] of shares, choice_chance, prompt_tokens (the
        shortest and longest prompt a length), samples, seed, trained_length, beyond, add_bos, examples (the first
        sample of each cell with what the model wrote), refused (lengths with no room for a prompt, and why).

    Raises:
        RecipeError: no length can be measured, or one is beyond the trained length.
        CheckpointError: the tokenizer cannot write numbers, or does not match the model.
    """
    from accelerate.utils import find_executable_batch_size
    from tqdm.auto import tqdm

    chosen = choose_lengths(loaded, lengths, beyond)
    room = answer_tokens(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings)
    shared = {"room": room, "distractors": distractors, "seed": seed}
    build = partial(build_prompt, loaded.tokenizer, loaded.add_bos, **shared)
    grid: list[tuple[int, list[list[Prompt]]]] = []
    refused = []
    for length in chosen:
        try:
            cells = [[build(length, depth, sample=sample) for sample in range(samples)] for depth in depths]
            grid.append((length, cells))
        except TooShort as error:
            refused.append({"length": length, "reason": str(error)})
    if not grid:
        raise RecipeError(
            f"no length of {chosen} has room for a prompt: {refused[-1]['reason']}. Give longer lengths."
        )
    result: dict[str, Any] = {
        "lengths": [],
        "depths": list(depths),
        "samples": samples,
        "seed": seed,
        "accuracy": [],
        "choice_accuracy": [],
        "choice_chance": 1 / (distractors + 1),
        "prompt_tokens": [],
        "answer_tokens": room,
        "trained_length": trained_length(loaded),
        "beyond": beyond,
        "add_bos": loaded.add_bos,
        "examples": [],
        "refused": refused,
    }
    total = sum(length * len(depths) * samples for length, _ in grid)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="Passkey", disable=not progress) as bar:
        for length, cells in grid:
            rows: dict[str, list[float]] = {"accuracy": [], "choice_accuracy": []}
            for prompts in cells:

                @find_executable_batch_size(
                    starting_batch_size=batch_size or min(samples, max(1, _BATCH_TOKENS // length))
                )
                def measure(size: int, prompts=prompts) -> tuple[list[str], list[bool]]:
                    batches = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
                    answers = [answer for batch in batches for answer in generate_answers(loaded, batch, room)]
                    return answers, [right for batch in batches for right in choose(loaded, batch)]

                answers, choices = measure()
                right = [only_digits(answer) == prompt.key for answer, prompt in zip(answers, prompts, strict=True)]
                rows["accuracy"].append(sum(right) / samples)
                rows["choice_accuracy"].append(sum(choices) / samples)
                example = {"length": length, "depth": prompts[0].depth, "key": prompts[0].key, "answer": answers[0]}
                result["examples"].append(example)
                bar.update(length * samples)
            sizes = [len(prompt.ids) for prompts in cells for prompt in prompts]
            result["lengths"].append(length)
            result["prompt_tokens"].append([min(sizes), max(sizes)])
            for name, row in rows.items():
                result[name].append(row)
            after_length(result)
    return result


def _padded(rows: Iterable[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, longest]. Padding is id 0, which the mask hides: any id of the vocabulary does."""
    ids = [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return tuple(pad_sequence(x, batch_first=True, padding_side=side) for x in (ids, masks))


@torch.no_grad()
def generate_answers(loaded: LoadedModel, prompts: Sequence[Prompt], new_tokens: int) -> list[str]:
    """What greedy generation with the KV cache writes after each prompt, decoded."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids, mask = _padded((prompt.ids for prompt in prompts), "left", model.device)
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
    )
    # generate() takes from the model's own configuration what an argument leaves open, such as a repetition penalty.
    own, model.generation_config = model.generation_config, greedy
    try:
        output = model.generate(ids, attention_mask=mask)
    finally:
        model.generation_config = own
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def choose(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[bool]:
    """Whether the true key has a higher log-likelihood after the prompt than every distractor; a tie is wrong.

    The tokens of prompt and key are those of the joined text; what all candidates of a prompt share is read once, and
    its cache serves them all.

    Raises:
        NumericsError: a log-likelihood is NaN, which would read as a wrong answer.
    """
    scores = candidate_scores(loaded, prompts)
    if bool(scores.isnan().any()):
        raise NumericsError(
            f"{loaded.name} gives NaN for a prompt of {len(prompts[0].ids)} tokens, so nothing can be said of what it "
            "retrieves. eval/activations.py names the layer."
        )
    return [bool((row[0] > row[1:]).all()) for row in scores]


@torch.no_grad()
def candidate_scores(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Tensor:
    """Log-likelihoods, nats, float32 [prompts, 1 + distractors], the key first.

    Every prompt has the same number of distractors.

    Raises:
        CheckpointError: the model has no KV cache.
    """
    model, device = loaded.model, loaded.model.device
    shared, endings = [], []
    for prompt in prompts:
        texts = [f"{prompt.text} {key}" for key in (prompt.key, *prompt.distractors)]
        whole = [encode(loaded.tokenizer, text, loaded.add_bos) for text in texts]
        common = len(os.path.commonprefix([prompt.ids, *whole]))
        # The last shared token is read with the endings: its output predicts their first token.
        shared.append(whole[0][: common - 1])
        endings.append([ids[common - 1 :] for ids in whole])
    candidates = len(endings[0])
    ids, mask = _padded(shared, "left", device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    # Without the head: a long prompt makes no logits.
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        raise CheckpointError(
            f"{type(model).__name__} keeps {type(cache).__name__} instead of a KV cache, which the candidates share; "
            "passkey retrieval cannot be measured for it."
        )
    cache.batch_repeat_interleave(candidates)

    rows = [row for group in endings for row in group]
    inputs, real = _padded((row[:-1] for row in rows), "right", device)
    targets, _ = _padded((row[1:] for row in rows), "right", device)
    begin = mask.sum(1).repeat_interleave(candidates)[:, None]
    logits = model(
        input_ids=inputs,
        attention_mask=torch.cat([mask.repeat_interleave(candidates, 0), real], 1),
        position_ids=begin + torch.arange(inputs.shape[1], device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    log_p = logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (log_p * real).sum(1).view(len(prompts), candidates)


def plot_grid(result: dict[str, Any], path: Path, title: str) -> None:
    """Two heat maps, lengths by depths: what generation writes, and the choice among numbers. PNG."""
    from matplotlib.figure import Figure

    lengths, depths = result["lengths"], result["depths"]
    size = (2.5 + 1.6 * len(lengths), 2 + 0.5 * len(depths))
    figure = Figure(figsize=(max(size[0], 6), size[1]), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = (f"written ({result['samples']} a cell)", f"chosen (chance {result['choice_chance']:.2g})")
    for axes, key, label in zip(panels, ("accuracy", "choice_accuracy"), titles, strict=True):
        image = axes.imshow(list(zip(*result[key], strict=True)), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths, rotation=45 if len(lengths) > 6 else 0)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=label, xlabel="tokens")
        for column, row in itertools.product(range(len(lengths)), range(len(depths))):
            value = result[key][column][row]
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    panels[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=panels, label="share found")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
