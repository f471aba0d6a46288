"""The statistics once more, from dense float64 maps and by loops over documents: what streaming must equal."""

import math

import torch


def documents(position_ids=None, mask=None, shape=None):
    """[(row, list of columns)] of every document of a batch."""
    rows, length = shape
    found = []
    for row in range(rows):
        columns = [t for t in range(length) if mask is None or mask[row, t]]
        start = 0
        for place in range(1, len(columns) + 1):
            ends = place == len(columns)
            if not ends and position_ids is not None:
                ends = position_ids[row, columns[place]] - position_ids[row, columns[place] - 1] != 1
            if ends:
                found.append((row, columns[start:place]))
                start = place
    return found


def attention(weights, visible, parts, min_sink_tokens, window=None):
    """Statistics by head of one layer.

    Args:
        weights: float64 [B, H, T, T]. visible: bool [B, T, T]. parts: of `documents`.
    """
    heads = weights.shape[1]
    result = {}
    for head in range(heads):
        mass, empty, entropies, zero, small, seen, distance, count = 0.0, 0, [], 0, 0, 0, 0.0, 0
        first, four, tops, positions, sizes, dormant = [], [], [], [], [], []
        for row, columns in parts:
            w = weights[row, head][columns][:, columns]
            see = visible[row][columns][:, columns]
            size = len(columns)
            count += size
            row_mass = w.sum(-1)
            mass += row_mass.sum().item()
            empty += int((row_mass == 0).sum())
            for i in range(size):
                if row_mass[i] > 0:
                    p = w[i] / row_mass[i]
                    entropies.append(torch.special.entr(p).sum().item())
            zero += int(((w == 0) & see).sum())
            small += int(((w <= 1e-5) & see).sum())
            seen += int(see.sum())
            i = torch.arange(size, dtype=torch.float64)
            distance += (w * (i[:, None] - i)).sum().item()
            dormant.append(row_mass.mean().item() < 0.01)
            if size >= min_sink_tokens:
                queries = see.sum(0)
                alpha = w.sum(0) / queries
                first.append(alpha[0].item())
                reach = see[:, :4].any(-1).sum()
                four.append((w[:, :4].sum() / reach).item())
                half = alpha[: (size + 1) // 2]
                tops.append(half.max().item())
                positions.append(int(half.argmax()))
                sizes.append(size)
        values = {
            "sink_rate": sum(a > 0.3 for a in first) / len(first) if first else math.nan,
            "first_mass": _mean(first, sizes),
            "first4_mass": _mean(four, sizes),
            "top_mass": _mean(tops, sizes),
            "row_mass": mass / count,
            "empty_rows": empty / count,
            "sparsity": zero / seen,
            "sparsity_small": small / seen,
            "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
            "distance": distance / mass if mass else math.nan,
            "dormant": all(dormant),
            "alphas": first,
            "alphas4": four,
            "alphas_top": tops,
            "positions": positions,
        }
        for name, value in values.items():
            result.setdefault(name, []).append(value)
    return result


def tiles(scores, visible, size):
    """(tiles with a visible score, those among them without a positive one) of one map [T, T] in float64."""
    total = empty = 0
    for i in range(0, scores.shape[0], size):
        for j in range(0, scores.shape[1], size):
            see = visible[i : i + size, j : j + size]
            if see.any():
                total += 1
                empty += not (scores[i : i + size, j : j + size][see] > 0).any()
    return total, empty


def activations(rows):
    """Statistics of a list of [T, C] float64 tensors, one a row."""
    x = torch.cat(rows)

    def kurtosis(values, dim=None):
        mean = values.mean() if dim is None else values.mean(dim, keepdim=True)
        centred = values - mean
        if dim is None:
            return (centred**4).mean() / (centred**2).mean() ** 2
        return (centred**4).mean(dim) / (centred**2).mean(dim) ** 2

    weights = [len(row) for row in rows]
    ordered = [row.abs().flatten().sort().values for row in rows]
    medians = [values[(len(values) - 1) // 2].item() for values in ordered]
    top = [[values[-k].item() for k in (1, 2, 3)] for values in ordered]
    massive = sum(
        int(((row.abs() > 100) & (row.abs() > 1000 * median)).sum()) for row, median in zip(rows, medians, strict=True)
    )
    return {
        "kurtosis": kurtosis(x).item(),
        "token_kurtosis": kurtosis(x, -1).mean().item(),
        "max": x.max().item(),
        "min": x.min().item(),
        "median": _mean(medians, weights),
        "top3": [_mean([each[k] for each in top], weights) for k in range(3)],
        "massive": massive,
    }


def _mean(values, weights):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else math.nan
