"""Measures of a feature space: k-NN accuracy, linear probes, retrieval, quality without labels.

features     features of a set, computed once
knn          the weighted vote of the nearest neighbours, in training and after it
probe        linear classifiers on cached features, by SGD or L-BFGS
quality      without labels: RankMe, alignment, uniformity
retrieval    how many of the nearest images are of the query's class

The vote is for features of any origin: ``softcl.knn_predict(features, bank, bank_labels, 10)``.
"""

from softcl.evaluation.features import eval_mode, extract, thinned
from softcl.evaluation.knn import KNN, NUM_NEIGHBORS, TEMPERATURE, knn_predict, nearest_rows, vote
from softcl.evaluation.quality import alignment, rankme, uniformity

__all__ = [
    "KNN",
    "NUM_NEIGHBORS",
    "TEMPERATURE",
    "alignment",
    "eval_mode",
    "extract",
    "knn_predict",
    "nearest_rows",
    "rankme",
    "thinned",
    "uniformity",
    "vote",
]
