"""The losses of sentence-transformers on given embeddings: a model that hands its input on, and two ways to its nearest loss.

Since `MultipleNegativesRankingLoss` has `directions`, samtone_query = 1 {QP, QQ} + 1 {PQ} is the sum of two calls,

    loss(q, p) with directions query_to_doc, query_to_query, one joint softmax   = 1 {QP, QQ}
    loss(p, q) with direction query_to_doc                                       = 1 {PQ}

and one call with query_to_doc, query_to_query, doc_to_query in one joint softmax is its nearest relative, 1 {QP, QQ, PQ} with the
positive counted twice (`samtone_query_joint` here; GTE's loss without the block PP).
"""

import inspect

import torch
from torch import nn

# Rows whose scores exist at a time in the cached loss; for embeddings that are there already, larger is faster.
MINI_BATCH = 2048


class Given(nn.Module):
    """The encoder of all engines here: embeddings that are there already."""

    def forward(self, features: dict[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["sentence_embedding"]}


def given_model() -> nn.Module:
    """With the indexing of a SentenceTransformer, which is a Sequential."""

    class Model(nn.Sequential):
        def forward(self, features: dict[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
            return self[0](features)

    return Model(Given())


class Ranking:
    """samtone_query by one of the two classes, in two calls, or the joint relative in one."""

    def __init__(self, cached: bool, joint: bool, temperature: float) -> None:
        from sentence_transformers import losses

        kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
        if "directions" not in inspect.signature(kind).parameters:
            raise RuntimeError("this version of sentence-transformers has no same-tower directions")
        options = {"scale": 1.0 / temperature} | ({"mini_batch_size": MINI_BATCH} if cached else {})
        forth = ("query_to_doc", "query_to_query") + (("doc_to_query",) if joint else ())
        self.forth = kind(given_model(), directions=forth, partition_mode="joint", **options)
        self.back = None if joint else kind(given_model(), directions=("query_to_doc",), **options)

    def __call__(self, query: torch.Tensor, passage: torch.Tensor, _temperature: float) -> torch.Tensor:
        columns = [{"sentence_embedding": query}, {"sentence_embedding": passage}]
        loss = self.forth(columns, labels=None)
        return loss if self.back is None else loss + self.back(columns[::-1], labels=None)
