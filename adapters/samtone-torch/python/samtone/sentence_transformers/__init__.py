"""Losses for the trainer of sentence-transformers, in place of its MultipleNegativesRankingLoss and the cached one.

    from samtone.sentence_transformers import SamToNeLoss

    loss = SamToNeLoss(model, temperature=0.05)
    trainer = SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss)

Columns are, in order, anchor, positive, and any number of hard negatives; labels are not used. These modules import nothing of
sentence-transformers: a model is whatever maps the features of a column to a dictionary with a `sentence_embedding`.
"""

from .columns import text_ids
from .losses import CachedSamToNeLoss, SamToNeLoss

__all__ = ["CachedSamToNeLoss", "SamToNeLoss", "text_ids"]
