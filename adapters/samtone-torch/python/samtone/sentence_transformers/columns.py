"""What a column of a batch consists of: which part of each feature belongs to which row."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import _native

Features = dict[str, Any]

# Modules of a model leave these among the features. They are inputs only where there is nothing else (bags of words).
_OUTPUTS = {"sentence_embedding", "token_embeddings", "cls_token_embeddings", "all_layer_embeddings"}
# They say where rows are, or hold for the whole column, and are no content of a row.
_ABOUT_ROWS = {"offsets", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "num_images_per_sample", "num_videos_per_sample"}
_OF_THE_COLUMN = {"prompt_length", "position_ids"}
# Images and videos of all rows one after the other: sizes of each in patches, all patches, how many a row has.
_MEDIA = (
    ("image_grid_thw", "pixel_values", "num_images_per_sample"),
    ("video_grid_thw", "pixel_values_videos", "num_videos_per_sample"),
)
_PATCHES = {name for grid, values, _ in _MEDIA for name in (grid, values)}
# The first of these that is there has a row for each input, unless there is `offsets` or `cu_seq_lens_q`.
_COUNTED = ("input_ids", "attention_mask", *(count for *_, count in _MEDIA), *(grid for grid, *_ in _MEDIA))
# Numbers that are multiplied at a time when features are compared: 32 MiB.
_AT_A_TIME = 1 << 22


def refused(argument: str, value: str, allowed: str) -> _native.SamtoneError:
    """The sentence for an argument outside of its domain."""
    return _native.SamtoneError(f"argument `{argument}` is {value}; allowed: {allowed}")


class Column:
    """The features of a column, and where each row of it is in them.

    Rows are the first dimension of a tensor, or lie one after the other: tokens of bags of embeddings (`offsets`) and of texts
    without padding (`cu_seq_lens_q`), images and videos in patches (`image_grid_thw`, `video_grid_thw`).
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        tensors = {name: x for name, x in features.items() if isinstance(x, Tensor) and x.dim() > 0}
        self.inputs = {name: x for name, x in tensors.items() if name not in _OUTPUTS} or tensors
        self.rows = self._count_rows()
        self.ends: dict[str, list[int]] = {}
        """For each tensor with a part for each row: where the part of each row ends."""
        self.packed = False
        """Whether the last dimension of tokens is that of all texts, one after the other."""
        self.unclear: list[str] = []
        """Tensors that do not say which rows they belong to."""
        if self.inputs:
            self._find_ends()

    def _count_rows(self) -> int:
        kinds = self.features.get("image_text_info")
        if isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
            return len(kinds)
        if "offsets" in self.inputs:
            return len(self.inputs["offsets"])
        if "cu_seq_lens_q" in self.inputs:
            return len(self.inputs["cu_seq_lens_q"]) - 1
        named = [self.inputs[name] for name in _COUNTED if name in self.inputs]
        return len(next(iter([*named, *self.inputs.values()]), ()))

    def _find_ends(self) -> None:
        each = list(range(1, self.rows + 1))
        kinds = self.features.get("image_text_info")
        if isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
            self.unclear = list(self.inputs)  # of CLIPModel: texts and images of one column in tensors of their own
            return
        media = self._media(each)
        tokens: list[int] = []
        if "offsets" in self.inputs:
            tokens = [*self.inputs["offsets"].tolist()[1:], len(self.inputs["input_ids"])]
        elif "cu_seq_lens_q" in self.inputs:
            tokens, self.packed = self.inputs["cu_seq_lens_q"].tolist()[1:], True
        for name, x in self.inputs.items():
            if name in media:
                self.ends[name] = media[name]
            elif name.startswith("cu_seq_lens_"):
                continue
            elif tokens and (x.shape[-1] == tokens[-1] if self.packed else name == "input_ids"):
                self.ends[name] = tokens
            elif len(x) == self.rows:
                self.ends[name] = each
            elif name not in _OF_THE_COLUMN:
                self.unclear.append(name)

    def _media(self, each: list[int]) -> dict[str, list[int]]:
        """Where the images and videos of each row end, in number and in patches."""
        ends: dict[str, list[int]] = {}
        for grid_name, values_name, count_name in _MEDIA:
            grid, values = self.inputs.get(grid_name), self.inputs.get(values_name)
            if grid is None or values is None:
                continue
            items = self.inputs[count_name].cumsum(0).tolist() if count_name in self.inputs else each
            patches = [0, *grid.prod(1).cumsum(0).tolist()]
            if items and items[-1] == len(grid) and patches[-1] == len(values):
                ends |= {grid_name: items, values_name: [patches[end] for end in items]}
        return ends

    def contents(self) -> list[tuple[Any, ...]] | None:
        """Something for each row that is equal for rows with equal features, whatever their padding. None if some feature does
        not say which rows it belongs to, or there is none."""
        if not self.ends or self.unclear:
            return None
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2 or self.packed or "offsets" in self.inputs:
            kept, counts = None, []
        else:
            kept = mask.detach().cpu().numpy() != 0
            counts = kept.sum(1).cumsum().tolist()
        names, parts = [], []
        for name in sorted(self.ends.keys() - _ABOUT_ROWS):
            x, ends = self.inputs[name].detach(), self.ends[name]
            padded = kept is not None and x.shape[:2] == kept.shape and name not in _PATCHES
            if padded and name == "attention_mask":
                continue
            names.append(name)
            if padded and x.dim() == 2 and not x.is_floating_point():
                # NumPy selects from a small matrix faster than PyTorch does.
                parts.append(_pieces(torch.from_numpy(x.cpu().numpy()[kept]), counts))
            elif padded:
                parts.append(_pieces(x[torch.from_numpy(kept).to(x.device)], counts))
            else:
                parts.append(_pieces(x.movedim(-1, 0) if self.packed and ends[-1] == x.shape[-1] else x, ends))
        return list(zip([tuple(names)] * self.rows, *parts)) if parts else None

    def parts(self, size: int) -> Iterator[Features]:
        """The features of so many rows at a time. What is not a tensor or list with something for each row is passed on as it is.

        Raises:
            SamtoneError: If a tensor does not say which rows it belongs to.
        """
        if not self.ends or self.unclear:
            value = (
                f"features of which {self.unclear} do not say which rows they belong to"
                if self.ends or self.unclear
                else (f"features {sorted(self.features)} without a tensor")
            )
            raise refused(
                "sentence_features",
                value,
                "tensors with a row for each input, texts with `offsets` or `cu_seq_lens_q`, and images and videos with their "
                "`image_grid_thw` or `video_grid_thw` and, unless each input has one, `num_images_per_sample` or "
                "`num_videos_per_sample`",
            )
        for start in range(0, self.rows, size):
            yield self._part(start, min(start + size, self.rows))

    def _part(self, start: int, stop: int) -> Features:
        part: Features = {}
        for name, value in self.features.items():
            ends = self.ends.get(name)
            if ends is not None:
                first, last = (0 if start == 0 else ends[start - 1]), ends[stop - 1]
                if name in _PATCHES and first == last:
                    continue  # models take these inputs for texts alone
                along = -1 if self.packed and ends[-1] == value.shape[-1] else 0
                part[name] = value.narrow(along, first, last - first)
                if name == "offsets":
                    part[name] = part[name] - value[start]
                elif name == "seq_idx":
                    part[name] = part[name] - start
            elif name.startswith("cu_seq_lens_"):
                part[name] = value[start : stop + 1] - value[start]
            elif self.packed and name.startswith("max_length_"):
                lengths = self.features["cu_seq_lens_q"][start : stop + 1].diff()
                part[name] = int(lengths.max())
            elif isinstance(value, (list, tuple)) and len(value) == self.rows:
                part[name] = value[start:stop]
            else:
                part[name] = value
        return part

    def like(self, other: Column) -> bool:
        """Whether a model takes both through the same of its modules, as far as features tell."""

        def kind(column: Column) -> dict[str, Any]:
            features = column.features.items()
            return {name: None if isinstance(x, (Tensor, list, tuple, int, float)) else x for name, x in features}

        return kind(self) == kind(other)


def _pieces(x: Tensor, ends: list[int]) -> list[bytes]:
    """The bytes of each row: of its integers, or of a digest of all that it has."""
    if x.dim() > 1 or x.is_floating_point():
        x = _digests(x)
    content = x.to(device="cpu", dtype=torch.int64)
    size = content.element_size() * (content[0].numel() if len(content) else 0)
    everything = content.numpy().tobytes()
    return [everything[a * size : b * size] for a, b in pairwise([0, *ends])]


def _digests(x: Tensor) -> Tensor:
    """128 bits for each item of the first dimension, computed where the tensor is: sums of its bits times random odd numbers,
    modulo 2^64, twice."""
    flat = x.detach().reshape(len(x), -1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.contiguous().view(kinds[flat.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (2, bits.shape[1]), generator=generator, dtype=torch.int64) | 1
    factors = factors.to(x.device)
    blocks = bits.split(max(1, _AT_A_TIME // max(1, bits.shape[1])))
    sums = [torch.stack([(block.to(torch.int64) * f).sum(1) for f in factors], 1) for block in blocks]
    return torch.cat(sums)


def _hash(content: tuple[Any, ...]) -> int:
    """Of the names of features, and the bytes of each."""
    names, *parts = content
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def text_ids(columns: list[Features], everywhere: bool = False) -> Tensor | None:
    """Equal numbers for equal inputs, over all columns one after the other: rows that are equal in all their features, tokens
    (prompts included) as well as images, audio and video. Padding does not count. None, with a warning, if a column has
    features that do not say which rows they belong to, since then equal inputs cannot be told.

    `everywhere`: The numbers are hashes of 64 bits, the same in every process."""
    numbers: dict[tuple[Any, ...], int] = {}
    ids: list[int] = []
    for features in columns:
        column = Column(features)
        contents = column.contents()
        if contents is None:
            what = (
                f"features {column.unclear} that do not say which rows they belong to"
                if column.unclear
                else "no tensors"
            )
            warnings.warn(
                f"equal inputs are not kept from being negatives of each other, since a column has {what}; "
                "`mask_duplicates=False` says that this is meant",
                stacklevel=2,
            )
            return None
        number = _hash if everywhere else lambda content: numbers.setdefault(content, len(numbers))
        ids.extend(map(number, contents))
    return torch.tensor(ids, dtype=torch.int64)
