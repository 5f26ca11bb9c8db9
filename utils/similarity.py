"""Near-duplicate questions: pairs, groups and nearest rows by TF-IDF cosine."""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.feature_extraction.text import (
    HashingVectorizer,
    TfidfTransformer,
    TfidfVectorizer,
)
from tqdm.auto import tqdm

from utils.sources import normalise, question_of

GROUP_COSINE = 0.55  # single linkage at .55 keeps FirstAidQA's groups at 18 at most
EXACT_UP_TO = 20_000  # above it MinHash proposes the pairs and the cosine decides


def near_duplicate_pairs(
    texts: Sequence[str],
    threshold: float = GROUP_COSINE,
    *,
    exact_up_to: int = EXACT_UP_TO,
    progress: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of `texts` whose TF-IDF cosine reaches `threshold`, in blocks.

    Word 1–2-grams with sublinear term frequency. Up to `exact_up_to` texts every
    pair is compared; above, MinHash (datasketch) proposes pairs that share word
    1–2-grams and the cosine decides.

    Yields:
        `(i, j, cosine)`: three arrays of equal length, `i < j`.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    if len(texts) < 2 or not any(map(vectorizer.build_analyzer(), texts)):
        return
    if len(texts) <= exact_up_to:
        vectors = vectorizer.fit_transform(texts).astype(np.float32)
        step = 500
        blocks = range(0, len(texts), step)
        for start in tqdm(blocks, "compare questions", disable=not progress):
            product = (vectors[start : start + step] @ vectors.T).tocoo()
            i, j = product.row + start, product.col
            keep = (product.data >= threshold) & (i < j)
            yield i[keep], j[keep], product.data[keep]
        return
    vectors = _hashed_tfidf(texts, progress)
    pairs = _minhash_candidates(vectors, progress)
    step = 50_000
    for start in range(0, len(pairs), step):
        i, j = pairs[start : start + step].T
        cosine = np.asarray(vectors[i].multiply(vectors[j]).sum(axis=1)).ravel()
        keep = cosine >= threshold
        yield i[keep], j[keep], cosine[keep]


def _hashed_tfidf(texts: Sequence[str], progress: bool):
    """What `TfidfVectorizer` gives, without holding millions of 2-grams as text.

    Each 1–2-gram is known by its hash below 2³⁰; of five million some 0.5 % share
    theirs with another. Returns a sparse matrix of shape (texts, distinct hashes).
    """
    hasher = HashingVectorizer(
        ngram_range=(1, 2),
        n_features=2**30,
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    counts = hasher.transform(tqdm(texts, "n-grams", disable=not progress))
    # Columns that no text uses would make the weights a vector of gigabytes.
    known, column = np.unique(counts.indices, return_inverse=True)
    counts.indices = column.astype(counts.indices.dtype)
    counts.resize(len(texts), len(known))
    weights = TfidfTransformer(sublinear_tf=True).fit(counts)
    return weights.transform(counts, copy=False)


def _minhash_candidates(vectors, progress: bool) -> np.ndarray:
    """Pairs (n, 2) of rows that share a band of a 96-value MinHash signature.

    The bands are three values wide: a pair with Jaccard similarity s is proposed
    with probability 1 - (1 - s³)³² (Leskovec, Rajaraman, Ullman: Mining of Massive
    Datasets, 3.4), 87 % at .4 and 98 % at .5. Shingles are the columns of the TF-IDF
    matrix, so that texts are cut into words once.
    """
    from datasketch import MinHash

    bands, width = 32, 3
    template = MinHash(num_perm=bands * width, seed=1, hashfunc=int)
    indices, indptr = vectors.indices, vectors.indptr
    size = vectors.shape[0]
    signatures = np.empty((size, bands * width), dtype=np.uint32)
    # Column numbers are small and dense; an odd multiplier spreads them over
    # 32 bits, which is what a hash function is for.
    hashed = indices.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    for row in tqdm(range(size), "MinHash", disable=not progress):
        sketch = template.copy()
        sketch.update_batch(hashed[indptr[row] : indptr[row + 1]].tolist())
        signatures[row] = sketch.hashvalues
    found = []
    for band in tqdm(range(bands), "bands", disable=not progress):
        keys = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = keys.view([("", keys.dtype)] * width).ravel()
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        # Neighbours in a bucket and each row with the bucket's first: linear in the
        # bucket, and enough for single linkage of groups that are alike.
        edges = np.stack([order[:-1][same], order[1:][same]], axis=1)
        starts = np.maximum.accumulate(
            np.where(np.r_[True, ~same], np.arange(len(order)), 0)
        )
        firsts = np.stack([order[starts[1:]][same], order[1:][same]], axis=1)
        found += [edges, firsts]
    pairs = np.sort(np.concatenate(found), axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(pairs, axis=0)


def group_questions(
    questions: Sequence[str], *, progress: bool = True
) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Group near-duplicate questions by single linkage at `GROUP_COSINE`.

    Args:
        questions: normalised; repeats fall into one group.

    Returns:
        The group key of every question, which is the group's smallest normalised
        question: a property of the group's own, so that rows elsewhere do not move
        it. And the pairs that were linked, `(question, question, cosine)`.
    """
    unique = sorted(set(questions))
    parent = list(range(len(unique)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    linked = []
    for first, second, cosine in near_duplicate_pairs(unique, progress=progress):
        for a, b, value in zip(first.tolist(), second.tolist(), cosine.tolist()):
            linked.append((unique[a], unique[b], value))
            a, b = root(a), root(b)
            parent[max(a, b)] = min(a, b)  # the smallest index is the smallest text
    index = {text: i for i, text in enumerate(unique)}
    return [unique[root(index[text])] for text in questions], linked


def nearest_rows(
    train: Sequence[dict], others: Sequence[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `others` the training row with the most similar question.

    Returns:
        Indices into `train` and TF-IDF cosines, each of shape (len(others),). The
        TF-IDF is fitted on the questions of both.
    """
    known = [normalise(question_of(row)) for row in train]
    asked = [normalise(question_of(row)) for row in others]
    if len(known) + len(asked) <= EXACT_UP_TO:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        both = vectorizer.fit_transform(known + asked)
    else:
        both = _hashed_tfidf(known + asked, progress=False)
    train_vectors, vectors = both[: len(known)], both[len(known) :]
    index, cosine = [], []
    for start in range(0, len(asked), 500):
        block = (vectors[start : start + 500] @ train_vectors.T).toarray()
        index.append(block.argmax(axis=1))
        cosine.append(block.max(axis=1))
    return np.concatenate(index), np.concatenate(cosine)
