"""Which document goes to which row, and the rows themselves as arrays. Knows lengths and ids, no text and no files."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowPlan:
    """Where each piece of each document lies: the pieces of row r are entries `first[r]` to `first[r + 1]`."""

    seq_len: int
    first: np.ndarray
    """[num_rows + 1] int64."""
    starts: np.ndarray
    """[num_pieces] int64, where the piece begins in the token file."""
    lengths: np.ndarray
    """[num_pieces] int64, tokens."""
    num_cut: int
    """Documents longer than a row, cut into full rows and a remainder."""

    @property
    def num_rows(self) -> int:
        """Rows of `seq_len` tokens."""
        return len(self.first) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces, without padding."""
        return int(self.lengths.sum())

    @property
    def padding(self) -> float:
        """Share of all positions that is padding."""
        return 1 - self.num_tokens / max(1, self.num_rows * self.seq_len)


def plan_rows(starts: np.ndarray, lengths: np.ndarray, seq_len: int, seed: int, one_document: bool = False) -> RowPlan:
    """Pack documents into rows: up to `seq_len` never split, longer ones cut into full rows and a remainder.

    Nothing is dropped. Rows are in a random order that depends on `seed` alone, and so are the documents within a row.

    Args:
        starts: [num_documents] where each document begins in the token file.
        lengths: [num_documents] tokens, each at least 1.
        seq_len: tokens of a row.
        one_document: no row holds more than one document, or piece of a longer one.
    """
    generator = np.random.default_rng(seed)
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    part = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_starts = starts[document] + part * seq_len
    piece_lengths = np.minimum(lengths[document] - part * seq_len, seq_len)
    # Best fit puts documents of equal length together; mixed first, these are not neighbours of the source.
    mixed = generator.permutation(len(document))
    piece_starts, piece_lengths = piece_starts[mixed], piece_lengths[mixed]
    count = len(piece_lengths)
    rows, num_rows = (np.arange(count), count) if one_document else best_fit(piece_lengths, seq_len)
    rows = generator.permutation(num_rows)[rows]
    order = np.lexsort((generator.random(len(rows), dtype=np.float32), rows))
    first = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=first[1:])
    return RowPlan(seq_len, first, piece_starts[order], piece_lengths[order], int((pieces > 1).sum()))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing bin packing: the longest item first, each into the fullest row that still has room for it.

    Items of one length, and rows with the same room, are interchangeable, so groups of them move in array operations:
    the time depends on `capacity` and the variety of lengths, hardly on the number of items.

    Args:
        lengths: [num_items] integers from 1 to `capacity`.

    Returns:
        [num_items] int64 row of each item, and the number of rows.
    """
    order = np.argsort((capacity - lengths).astype(np.uint32), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    rows_of_sorted = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # sorted rooms for which open[room] is not empty
    open_rows: dict[int, list[np.ndarray]] = {}
    num_rows = position = 0

    def put(room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            if room not in open_rows:
                open_rows[room] = []
                insort(rooms, room)
            open_rows[room].append(rows)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room = capacity
                rows = np.arange(num_rows, num_rows - (-left // (capacity // length)))
                num_rows += len(rows)
            else:
                room = rooms[at]
                rows = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            # A row that took one item is now the fullest that fits the next, until it is too full: `each` items a row.
            each = room // length
            needed = -(-left // each)
            put(room, rows[needed:])
            rows = rows[:needed]
            placed = min(left, each * len(rows))
            rows_of_sorted[position : position + placed] = np.repeat(rows, each)[:placed]
            in_last = placed - each * (len(rows) - 1)
            put(room - each * length, rows[:-1])
            put(room - in_last * length, rows[-1:])
            position += placed
            left -= placed
    rows = np.empty(len(lengths), np.int64)
    rows[order] = rows_of_sorted
    return rows, num_rows


def fill_rows(
    plan: RowPlan, tokens: np.ndarray, begin: int, end: int, pad_token_id: int, isolate_documents: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `begin` to `end` of a plan.

    Args:
        tokens: the token file, any integer dtype.
        isolate_documents: positions restart at every document and at the padding; if not, they count through the row.

    Returns:
        input_ids [R, T], position_ids [R, T] and num_tokens [R], int32.
    """
    first, last = plan.first[begin], plan.first[end]
    starts, lengths = plan.starts[first:last], plan.lengths[first:last]
    num_pieces = np.diff(plan.first[begin : end + 1])
    ends = np.cumsum(lengths)
    row_ends = ends[plan.first[begin + 1 : end + 1] - first - 1]
    num_tokens = np.diff(row_ends, prepend=0)
    # Where a piece begins in its row, and where all pieces of earlier rows lie back to back.
    offsets = ends - lengths - np.repeat(row_ends - num_tokens, num_pieces)
    is_token = np.arange(plan.seq_len) < num_tokens[:, None]
    source = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    input_ids = np.full((end - begin, plan.seq_len), pad_token_id, np.int32)
    input_ids[is_token] = tokens[source]
    position_ids = np.broadcast_to(np.arange(plan.seq_len, dtype=np.int32), input_ids.shape)
    if isolate_documents:
        document_start = np.zeros_like(input_ids)
        document_start[np.repeat(np.arange(end - begin), num_pieces), offsets] = offsets
        has_padding = num_tokens < plan.seq_len
        document_start[has_padding, num_tokens[has_padding]] = num_tokens[has_padding]
        position_ids = position_ids - np.maximum.accumulate(document_start, axis=1)
    return input_ids, np.ascontiguousarray(position_ids), num_tokens.astype(np.int32)


def hold_out(hashes: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Choose validation documents: those with the smallest seeded hash of their text, about `share` of all tokens.

    Equal texts have equal hashes, so a duplicate is never on the other side. At least one text is held out, and at
    least one left, where there are two different ones. More than half as much again as the share, and more than two
    texts of median length, are held out of no corpus: texts that would be too much are left to training.

    Args:
        hashes: [num_documents] uint64.
        lengths: [num_documents] tokens.
        share: from 0 (none) up to 1.

    Returns:
        [num_documents] bool; a text that occurs several times is marked each time.
    """
    chosen = first_by_hash(hashes, lengths, share)
    texts, text_of = np.unique(hashes, return_inverse=True)
    if not chosen.any() or len(texts) < 2:
        return chosen
    total, sizes = lengths.sum(), np.bincount(text_of, weights=lengths)
    median = np.sort(sizes)[(len(sizes) - 1) // 2]
    bound = max(1.5 * share * total, min(2 * median, total / 2))
    if lengths[chosen].sum() <= bound:
        return chosen
    small = np.flatnonzero(sizes <= share * total)
    kept = small[np.cumsum(sizes[small]) <= share * total]
    if not len(kept):
        kept = np.flatnonzero(sizes <= bound)[:1]
    return np.isin(text_of, kept)


def first_by_hash(hashes: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """What `hold_out` chooses where no text is large: the first by hash that have the share together, at least one."""
    if not share or not len(hashes):
        return np.zeros(len(hashes), bool)
    order = np.argsort(hashes, kind="stable")
    is_within = np.cumsum(lengths[order]) <= share * lengths.sum()
    different = np.unique(hashes)
    last = hashes[order[max(0, int(is_within.sum()) - 1)]]
    return hashes <= (min(last, different[-2]) if len(different) > 1 else last)
