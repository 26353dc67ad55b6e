"""How good answers are: numbers from answers and targets, in training and in `Hub.evaluate`. Pure.

F1 over labels is counted as scikit-learn does (which warns where labels are many), ROUGE-L is rouge-score's and chrF sacrebleu's, so that
figures compare with those of others.
"""

# n rows, c classes

from __future__ import annotations

import importlib.util
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_hub.errors import InvalidInput

LOG_LOSS_FLOOR = 1e-12
OUTSIDE = "O"    # the label of what no span holds
_TEXT_PACKAGES = ("rouge_score", "sacrebleu")

Span = tuple[int, int, str]    # start, end, label: characters of a text


# ---- labels ---------------------------------------------------------------------------------------------------------


def classifier_metrics(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 and log_loss (nats) of logits (n, c) against class numbers (n,).

    macro_f1 averages over the classes that occur, in targets or in answers.
    """
    return _class_metrics(logits.argmax(axis=1), targets) | {"log_loss": float(log_losses(logits, targets).mean())}


def log_losses(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,), nats, of logits (n, c) against class numbers (n,)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(targets)), targets], LOG_LOSS_FLOOR)))


def label_metrics(answers: Sequence[str | None], targets: Sequence[str], labels: Iterable[str]) -> dict[str, float]:
    """accuracy and macro_f1. An answer that is none of the task's `labels` is wrong, and no class of its own: another task gave it."""
    codes = {label: code for code, label in enumerate(dict.fromkeys([*labels, *targets]))}
    found = [-1 if answer is None else codes.get(answer, -1) for answer in answers]
    return _class_metrics(np.array(found), np.array([codes[target] for target in targets]))


def _class_metrics(answers: NDArray[np.int64], targets: NDArray[np.int64]) -> dict[str, float]:
    """Of class numbers (n,); -1 is no class."""
    right, numbers = answers == targets, 1 + int(max(answers.max(), targets.max()))
    both, mine, theirs = (np.bincount(found, minlength=numbers) for found in (targets[right], answers[answers >= 0], targets))    # (c,)
    either = mine + theirs    # counts a row of both twice; 0 where a class does not occur
    return {"accuracy": float(right.mean()), "macro_f1": float((2 * both[either > 0] / either[either > 0]).mean())}


def labels_metrics(logits: NDArray[np.float32], targets: NDArray[np.bool_]) -> dict[str, float]:
    """`sets_metrics`, and log_loss a label, of logits (n, c), each by itself."""
    signed = np.where(targets, logits, -logits).astype(np.float64)
    return sets_metrics(logits >= 0, targets) | {"log_loss": float(np.logaddexp(0, -signed).mean())}    # probability ½


def sets_metrics(answers: NDArray[np.bool_], targets: NDArray[np.bool_]) -> dict[str, float]:
    """accuracy (rows whose every label is right) and macro_f1 over the labels that occur (1 where none does), of (n, c)."""
    both, either = (answers & targets).sum(axis=0), answers.sum(axis=0) + targets.sum(axis=0)    # (c,); either counts a row of both twice
    scores = 2 * both[either > 0] / either[either > 0]
    return {"accuracy": float((answers == targets).all(axis=1).mean()), "macro_f1": float(scores.mean()) if len(scores) else 1.0}


# ---- numbers --------------------------------------------------------------------------------------------------------


def number_metrics(answers: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    """rmse, mae, and Pearson's correlation (0 where either side is constant) of numbers (n,)."""
    apart = answers.astype(np.float64) - targets
    constant = np.ptp(answers) == 0 or np.ptp(targets) == 0
    return {
        "rmse": float(np.sqrt((apart**2).mean())),
        "mae": float(np.abs(apart).mean()),
        "correlation": 0.0 if constant else float(np.corrcoef(answers, targets)[0, 1]),
    }


# ---- spans ----------------------------------------------------------------------------------------------------------


def spans_of(tokens: Iterable[Span], text: str, labels: Iterable[str]) -> frozenset[Span]:
    """Spans of labelled tokens: neighbours of one label are one span. White space at a span's borders is not part of it.

    Where all `labels` are of the form B-X and I-X, a B- begins a span, and so does an I- that follows nothing of its X (seqeval's default mode).
    """
    tagged = _tagged(labels)
    found: list[Span] = []
    before: str | None = None
    for start, end, label in tokens:
        begins, name = (label[:2] == "B-", label[2:]) if tagged and label != OUTSIDE else (False, label)
        if name == OUTSIDE:
            before = None
            continue
        if name == before and not begins:
            found[-1] = (found[-1][0], end, name)
        else:
            found.append((start, end, name))
        before = name
    return frozenset(trimmed(span, text) for span in found)


def trimmed(span: Span, text: str) -> Span:
    """Without white space at its borders: a token may begin with the space before its word."""
    start, end, label = span
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip()), label


def spans_metrics(answers: Sequence[frozenset[Span]], targets: Sequence[frozenset[Span]]) -> dict[str, float]:
    """span_precision, span_recall and span_f1 over all rows, as seqeval counts: right with both borders and the label. 1 of nothing at all."""
    hits = sum(len(mine & theirs) for mine, theirs in zip(answers, targets, strict=True))
    found, wanted = sum(map(len, answers)), sum(map(len, targets))
    return {
        "span_precision": hits / found if found else float(not wanted),
        "span_recall": hits / wanted if wanted else float(not found),
        "span_f1": 2 * hits / (found + wanted) if found + wanted else 1.0,
    }


def token_hits(tokens: Sequence[tuple[int, int, str | None]], spans: Iterable[Span], labels: Iterable[str]) -> list[bool]:
    """Of each token, whether its label is that of the first span that it touches, or OUTSIDE. B- and I- are not told apart."""
    ordered, tagged = sorted(spans), _tagged(labels)
    hits = []
    for start, end, label in tokens:
        wanted = next((name for begin, stop, name in ordered if begin < end and start < stop), OUTSIDE)
        hits.append((label[2:] if tagged and label and label != OUTSIDE else label) == wanted)
    return hits


def _tagged(labels: Iterable[str]) -> bool:
    named = [label for label in labels if label != OUTSIDE]
    return bool(named) and all(label[:2] in ("B-", "I-") for label in named)


# ---- texts ----------------------------------------------------------------------------------------------------------


def same_text(answer: str | None, target: str) -> bool:
    """Whether both are the same but for white space. Case, articles and punctuation count (SQuAD's measure drops them): code has them too."""
    return answer is not None and answer.split() == target.split()


def check_text_packages() -> None:
    """Raises InvalidInput where a package that `text_metrics` needs is not installed."""
    if missing := [name for name in _TEXT_PACKAGES if importlib.util.find_spec(name) is None]:
        fact = f"measuring written texts needs {' and '.join(missing)}"
        raise InvalidInput(f"{fact}, which is not installed.", hint="Install the extra: pip install 'adapter_hub[evaluation]'.")


def text_metrics(answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """exact_match (`same_text`), rouge_l (F-measure, mean of the rows) and chrf (of all rows together), 0-1.

    ROUGE-L (Lin 2004) is of lower-cased words of a-z and 0-9, without stemming, as rouge-score splits them: of other scripts it is 0.
    chrF (Popović 2015) is sacrebleu's with its own settings, over 100, and of any script. Raises InvalidInput without those packages.
    """
    check_text_packages()
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
    from sacrebleu.metrics.chrf import CHRF

    rouge = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer())    # of its own it is said on the root logger, which that sets up
    pairs = list(zip(answers, targets, strict=True))
    return {
        "exact_match": float(np.mean([same_text(answer, target) for answer, target in pairs])),
        "rouge_l": float(np.mean([rouge.score(target, answer)["rougeL"].fmeasure for answer, target in pairs])),
        "chrf": float(CHRF().corpus_score(list(answers), [list(targets)]).score) / 100,
    }


def perplexity(nats: float, tokens: int) -> float:
    """Of a summed negative log likelihood. Infinite where a float cannot hold it."""
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def mean_metrics(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each metric its mean over those that have it, in the order of their first appearance."""
    values: dict[Hashable, list[float]] = {}
    for metrics in found:
        for key, value in metrics.items():
            values.setdefault(key, []).append(value)
    return {str(key): float(np.mean(each)) for key, each in values.items()}
