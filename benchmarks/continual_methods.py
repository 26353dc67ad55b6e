"""How else a sequence of tasks is learned, on the same base, examples and passes: one LoRA throughout, and heads on the frozen encoder.

`Scores` are the ways that score every label with one model; the hub has its own module. What a way may see: the rows of the task at
hand, and what it kept of the earlier ones itself. Joint ways see all tasks at once, and bound the others.
"""

from __future__ import annotations

import hashlib
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from continual_data import Task
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from scipy import linalg
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.examples import Example, digest_of
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.contest import NEAR, TEMPERATURE
from adapter_hub.routing.encoder import Encoder
from adapter_hub.training.config import ALL_LINEAR, TrainConfig
from adapter_hub.training.frozen import HIDDEN, below, computed_once
from adapter_hub.training.probe import inputs_of, probe
from adapter_hub.training.train import train_classifier

# n rows, c labels of the whole sequence, d encoder width, h hidden width, r rank
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
REPLAYED = 0.02            # of each earlier task's rows (the baseline)
ELASTICITY = 1000.0        # of EWC, set by hand: not searched
FISHER_ROWS = 200
ORTHOGONALITY = 0.5        # of O-LoRA, as its authors' code
RANDOM_FEATURES = 4096
PENALTIES = (0.001, 0.01, 0.1, 1.0)    # of the random-feature ridge, in mean eigenvalues
INVERSE_PENALTIES = (1.0, 10.0, 100.0)    # of the joint probe
BATCH_ROWS = 64
BUCKET = 8                 # batches whose rows are sorted by length together
ONCE_ROWS = 16             # rows for computing hidden states once
SETTINGS = (REPLAYED, ELASTICITY, FISHER_ROWS, ORTHOGONALITY, RANDOM_FEATURES, PENALTIES, INVERSE_PENALTIES, NEAR, TEMPERATURE)


class Scores(Protocol):
    """One model of all labels."""

    joint: bool

    def learn(self, tasks: Sequence[Task]) -> None:
        """The next task, or all of them where `joint`."""

    def scores(self, texts: Sequence[str]) -> F32:
        """(n, c); -inf for a label that was never seen."""

    @property
    def bytes_stored(self) -> int: ...


# ---- heads on the frozen encoder -------------------------------------------------------------------------------------


class Vectors:
    """Embeddings, each text once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._known = encoder, dict[str, F32]()

    def __call__(self, texts: Sequence[str]) -> F32:
        """(n, d)"""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known |= zip(new, self._encoder.encode(new), strict=True)
        return np.array([self._known[text] for text in texts])


class ClassMean:
    """Nearest class mean by cosine (as iCaRL's rule, Rebuffi et al. 2017, on a frozen encoder)."""

    joint = False

    def __init__(self, vectors: Vectors, labels: Sequence[str]) -> None:
        self._vectors, self._place = vectors, {label: place for place, label in enumerate(labels)}
        self._sums: dict[str, F32] = {}

    def learn(self, tasks: Sequence[Task]) -> None:
        rows = [row for task in tasks for row in task.rows]
        for row, vector in zip(rows, self._vectors([row.text for row in rows]), strict=True):
            label = str(row.label)
            self._sums[label] = self._sums.get(label, np.zeros_like(vector)) + vector

    def scores(self, texts: Sequence[str]) -> F32:
        found = np.full((len(texts), len(self._place)), -np.inf, np.float32)
        vectors = self._vectors(texts)
        for label, total in self._sums.items():
            found[:, self._place[label]] = vectors @ (total / np.linalg.norm(total))
        return found

    @property
    def bytes_stored(self) -> int:
        return sum(total.nbytes for total in self._sums.values())


class LabelNames(ClassMean):
    """The base alone: the label whose name is nearest. It learns nothing but which labels there are."""

    def learn(self, tasks: Sequence[Task]) -> None:
        labels = [label for task in tasks for label in task.labels]
        self._sums |= zip(labels, self._vectors([label.replace("_", " ") for label in labels]), strict=True)


class RandomRidge:
    """Ridge on random ReLU features, by sums over the rows (RanPAC, McDonnell et al. 2023): the order of tasks changes nothing.

    The penalty is chosen anew on the carved rows of all tasks so far, which then are among the sums.
    """

    joint = False

    def __init__(self, vectors: Vectors, labels: Sequence[str], seed: int) -> None:
        self._vectors, self._place, self._seed = vectors, {label: place for place, label in enumerate(labels)}, seed
        self._sums = [np.zeros((RANDOM_FEATURES, width)) for width in (RANDOM_FEATURES, len(labels))]    # Gram matrix and moments
        self._carved: list[Example] = []

    def _features(self, texts: Sequence[str]) -> F32:
        vectors = self._vectors(texts)
        drawn = np.random.default_rng(self._seed).standard_normal((vectors.shape[1], RANDOM_FEATURES), np.float32)
        return np.maximum(vectors @ drawn, 0)

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._add(self._sums, task.train)
            self._carved += task.validation
        carved = self._features([row.text for row in self._carved])
        targets = [self._place[str(row.label)] for row in self._carved]
        right = {penalty: (self._masked(carved @ _ridge(*self._sums, penalty)).argmax(axis=1) == targets).mean() for penalty in PENALTIES}
        both = [sums.copy() for sums in self._sums]
        self._add(both, self._carved)
        self._weights = _ridge(*both, max(PENALTIES, key=right.__getitem__))

    def _add(self, sums: list[F64], rows: Sequence[Example]) -> None:
        features = self._features([row.text for row in rows])
        sums[0] += features.T @ features
        np.add.at(sums[1].T, [self._place[str(row.label)] for row in rows], features)

    def _masked(self, scores: F32) -> F32:
        return np.where(self._sums[1].any(axis=0), scores, -np.inf).astype(np.float32)

    def scores(self, texts: Sequence[str]) -> F32:
        return self._masked(self._features(texts) @ self._weights)

    @property
    def bytes_stored(self) -> int:
        return sum(sums.nbytes for sums in self._sums) + sum(len(row.text.encode()) for row in self._carved)


class JointProbe:
    """One logistic regression on the embeddings of all tasks at once; its penalty is chosen on carved rows, which it then learns, too."""

    joint = True

    def __init__(self, vectors: Vectors, labels: Sequence[str]) -> None:
        self._vectors, self._labels = vectors, list(labels)

    def learn(self, tasks: Sequence[Task]) -> None:
        train, carved = ([row for task in tasks for row in part(task)] for part in (lambda task: task.train, lambda task: task.validation))
        x, y = (self._vectors([row.text for row in rows]) for rows in (train, carved))
        targets, asked = ([str(row.label) for row in rows] for rows in (train, carved))
        right = {c: LogisticRegression(C=c, max_iter=500).fit(x, targets).score(y, asked) for c in INVERSE_PENALTIES}
        best = LogisticRegression(C=max(INVERSE_PENALTIES, key=right.__getitem__), max_iter=500)
        self._head = best.fit(np.concatenate([x, y]), targets + asked)

    def scores(self, texts: Sequence[str]) -> F32:
        known = [self._labels.index(label) for label in self._head.classes_]
        found = np.full((len(texts), len(self._labels)), -np.inf, np.float32)
        found[:, known] = np.log(np.maximum(self._head.predict_proba(self._vectors(texts)), 1e-12))
        return found

    @property
    def bytes_stored(self) -> int:
        return self._head.coef_.size * 4


def _ridge(gram: F64, moments: F64, penalty: float) -> F64:
    """(features, c)"""
    gram = gram.copy()
    gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram)
    return np.asarray(linalg.solve(gram, moments, assume_a="pos", overwrite_a=True))


# ---- one LoRA throughout ------------------------------------------------------------------------------------------------


class SequentialLora:
    """One LoRA and one head, trained on task after task (the lower bound: nothing keeps what was learned)."""

    joint = False

    def __init__(self, base: FrozenBase, labels: Sequence[str], config: TrainConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self._base, self._config, self._random = base, config, random.Random(seed)
        self._place = {label: place for place, label in enumerate(labels)}
        self._seen: list[int] = []
        self._below: dict[str, Tensor] = {}    # of each text that was asked, what reaches the first adapted layer: the same after every task
        whole = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=len(labels), local_files_only=True)
        self._whole = whole.to(base.device)
        shape = LoraConfig(
            task_type="SEQ_CLS", r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=ALL_LINEAR,
            exclude_modules=below(self._whole, config),
        )  # fmt: skip
        self._model: Any = get_peft_model(self._whole, shape)

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._start(task)
            self._seen = sorted({*self._seen, *(self._place[label] for label in task.labels)})
            self._fit(task.rows, self._seen)

    def _extra(self) -> Tensor | None:
        """What else is in the loss of a batch."""
        return None

    def _start(self, task: Task) -> None:
        """The head's rows of a task's new labels from a linear probe of what the model makes of its inputs, as the hub's trainer starts its heads.

        A label that an earlier task had keeps its row.
        """
        rows = sorted(task.rows, key=lambda row: len(row.text))
        encoded = self._base.encode([row.text for row in rows])
        inputs = [{key: torch.tensor(row.ids[key]) for key in ("input_ids", "attention_mask")} for row in encoded]
        batches = (_padded(inputs[at : at + BATCH_ROWS]) for at in range(0, len(inputs), BATCH_ROWS))
        layer = self._whole.classifier.modules_to_save["default"]
        weight, bias = probe(inputs_of(layer, self._model, batches), np.array([task.labels.index(str(row.label)) for row in rows]))
        new = [number for number, label in enumerate(task.labels) if self._place[label] not in self._seen]
        places = [self._place[task.labels[number]] for number in new]
        with torch.no_grad():
            layer.weight[places] = torch.from_numpy(weight[new]).to(layer.weight)
            layer.bias[places] = torch.from_numpy(bias[new]).to(layer.bias)

    def _fit(self, rows: Sequence[Example], known: Sequence[int]) -> None:
        """As the hub's trainer, but for the choice of an epoch, the last is taken: AdamW, warm-up, then down to 0; `known` labels compete."""
        config, model = self._config, self._model
        encoded = self._base.encode([row.text for row in rows])
        place = {label: number for number, label in enumerate(known)}
        targets = torch.tensor([place[self._place[str(row.label)]] for row in rows], device=self._base.device)
        inputs = [{key: torch.tensor(row.ids[key]) for key in ("input_ids", "attention_mask")} for row in encoded]
        lengths = [len(row["input_ids"]) for row in inputs]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        head = list(self._whole.classifier.modules_to_save["default"].parameters())    # no decay: rows of other tasks' labels would shrink
        body = [parameter for parameter in trained if not any(parameter is one for one in head)]
        groups = [{"params": body, "weight_decay": config.weight_decay}, {"params": head, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, config.learning_rate)
        steps = config.epochs * math.ceil(len(rows) / config.batch_size)
        warm = max(1, int(config.warmup_ratio * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, max(0, (steps - step) / max(1, steps - warm))))
        once = (_padded([inputs[i] for i in order[at : at + ONCE_ROWS]]) for at in range(0, len(order), ONCE_ROWS))
        with computed_once(model, self._whole, once) as hidden:
            for i, states in zip(order, hidden or (), strict=False):
                inputs[i][HIDDEN] = states
            model.train()
            for _ in range(config.epochs):
                for batch in self._batches(lengths):
                    logits = model(**self._padded([inputs[i] for i in batch])).logits[:, known]
                    loss = nn.functional.cross_entropy(logits, targets[batch], label_smoothing=config.label_smoothing)
                    extra = self._extra()
                    (loss if extra is None else loss + extra).backward()
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        model.eval()

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of like length together, in random order."""
        order = self._random.sample(range(len(lengths)), len(lengths))
        size, found = self._config.batch_size, []
        for start in range(0, len(order), BUCKET * size):
            bucket = sorted(order[start : start + BUCKET * size], key=lengths.__getitem__)
            found += [bucket[at : at + size] for at in range(0, len(bucket), size)]
        return self._random.sample(found, len(found))

    def _padded(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: tensor.to(self._base.device) for key, tensor in _padded(rows).items()}

    def scores(self, texts: Sequence[str]) -> F32:
        encoded = self._base.encode(texts)
        inputs = [{key: torch.tensor(row.ids[key]) for key in ("input_ids", "attention_mask")} for row in encoded]
        order = sorted(range(len(texts)), key=lambda i: len(inputs[i]["input_ids"]))
        new = [i for i in order if texts[i] not in self._below]
        once = (_padded([inputs[i] for i in new[at : at + BATCH_ROWS]]) for at in range(0, len(new), BATCH_ROWS))
        found = np.full((len(texts), len(self._place)), -np.inf, np.float32)
        with computed_once(self._model, self._whole, once) as hidden, torch.inference_mode():
            if hidden is not None:
                self._below |= {texts[i]: states for i, states in zip(new, hidden, strict=True)}
                inputs = [row | {HIDDEN: self._below[text]} for row, text in zip(inputs, texts, strict=True)]
            for start in range(0, len(order), BATCH_ROWS):
                rows = order[start : start + BATCH_ROWS]
                found[np.ix_(rows, self._seen)] = self._model(**self._padded([inputs[i] for i in rows])).logits[:, self._seen].cpu().numpy()
        return found

    @property
    def bytes_stored(self) -> int:
        return sum(parameter.nbytes for parameter in self._model.parameters() if parameter.requires_grad)


class Alone(SequentialLora):
    """A LoRA a task, each from the base: what one LoRA would be without the other tasks. For forward transfer, and with the task named."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fresh = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    if name in self._fresh:
                        parameter.copy_(self._fresh[name])
            self._seen = []
            super().learn([task])


class Replay(SequentialLora):
    """Sequential, with REPLAYED of each earlier task's rows among the new ones."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kept: list[Example] = []

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._start(task)
            self._seen = sorted({*self._seen, *(self._place[label] for label in task.labels)})
            self._fit([*task.rows, *self._kept], self._seen)
            self._kept += self._random.sample(task.rows, max(1, round(REPLAYED * len(task.rows))))

    @property
    def bytes_stored(self) -> int:
        return super().bytes_stored + sum(len(row.text.encode()) for row in self._kept)


class Elastic(SequentialLora):
    """EWC (Kirkpatrick et al. 2017) in its online form (Schwarz et al. 2018): what earlier tasks need resists change."""

    def __init__(self, base: FrozenBase, labels: Sequence[str], config: TrainConfig, seed: int, elasticity: float = ELASTICITY) -> None:
        super().__init__(base, labels, config, seed)
        self._elasticity = elasticity
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _extra(self) -> Tensor | None:
        if not self._anchor:
            return None
        moved = [(self._fisher[name] * (parameter - self._anchor[name]) ** 2).sum() for name, parameter in self._trained().items()]
        return self._elasticity / 2 * torch.stack(moved).sum()

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            super().learn([task])
            rows = self._random.sample(task.rows, min(FISHER_ROWS, len(task.rows)))
            summed = {name: torch.zeros_like(parameter) for name, parameter in self._trained().items()}
            for row in rows:
                ids = self._base.encode([row.text])[0].ids
                logits = self._model(**self._padded([{key: torch.tensor(ids[key]) for key in ("input_ids", "attention_mask")}])).logits
                target = torch.tensor([self._seen.index(self._place[str(row.label)])], device=self._base.device)
                nn.functional.cross_entropy(logits[:, self._seen], target).backward()
                for name, parameter in self._trained().items():
                    if parameter.grad is not None:
                        summed[name] += parameter.grad**2 / len(rows)
                self._model.zero_grad()
            self._fisher = {name: self._fisher.get(name, 0) + value for name, value in summed.items()}
            self._anchor = {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @property
    def bytes_stored(self) -> int:
        return 3 * super().bytes_stored


class OrthogonalLora(SequentialLora):
    """O-LoRA (Wang et al. 2023): a fresh LoRA a task, kept orthogonal to the earlier ones, which are merged into the weights.

    Its authors' model writes labels as text; here a task trains the head's rows of its own labels alone, so that those of other labels
    stay as they are. Labels of different tasks are thus never compared while training, and are at test.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._earlier: dict[str, list[Tensor]] = {name: [] for name, _ in self._layers()}

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        found = ((name, module) for name, module in self._model.named_modules() if isinstance(module, LoraLayer))
        return [(name, module) for name, module in found if "default" in module.lora_A]

    def _extra(self) -> Tensor | None:
        overlaps = [
            (earlier @ module.lora_A["default"].weight.T).abs().sum() for name, module in self._layers() for earlier in self._earlier[name]
        ]
        return ORTHOGONALITY * torch.stack(overlaps).sum() if overlaps else None

    def learn(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._start(task)
            own = sorted(self._place[label] for label in task.labels)
            self._seen = sorted({*self._seen, *own})
            self._fit(task.rows, own)
            with torch.no_grad():
                for name, module in self._layers():
                    module.get_base_layer().weight += module.get_delta_weight("default")
                    self._earlier[name].append(module.lora_A["default"].weight.detach().clone())
                    module.reset_lora_parameters("default", True)

    @property
    def bytes_stored(self) -> int:
        head = sum(parameter.nbytes for parameter in self._whole.classifier.modules_to_save["default"].parameters())
        return head + (super().bytes_stored - head) * max(1, len(next(iter(self._earlier.values()), ())))


class JointLora:
    """One LoRA on all tasks at once, by the hub's own trainer."""

    joint = True

    def __init__(self, base: FrozenBase, labels: Sequence[str], config: TrainConfig, kept: Path, recipe: str) -> None:
        self._base, self._labels, self._config, self._kept, self._recipe = base, list(labels), config, kept, recipe

    def learn(self, tasks: Sequence[Task]) -> None:
        """The same rows, however they are cut into tasks, are trained on once."""
        train, carved = (sorted((row for task in tasks for row in part(task)), key=_text) for part in (lambda t: t.train, lambda t: t.validation))
        what = hashlib.sha256(repr((self._config, self._recipe, str(self._base.device))).encode()).hexdigest()[:8]
        folder = self._kept / f"joint-{digest_of([*train, *carved])[-8:]}-{what}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self._kept) as scratch:
                made = Path(scratch) / "made"
                result = train_classifier(self._base, train, task="joint", validation=carved, config=self._config, folder=made / "adapter")
                (made / "seconds").write_text(str(result.seconds))
                if not folder.exists():    # by another process, meanwhile
                    made.rename(folder)
        self._adapter = read_adapter(folder / "adapter", labels=sorted({str(row.label) for row in train}))
        self.trained_s = float((folder / "seconds").read_text())
        self.bytes_stored = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
        self._engine = Engine(self._base, lambda _: self._adapter)

    def scores(self, texts: Sequence[str]) -> F32:
        found = np.full((len(texts), len(self._labels)), -np.inf, np.float32)
        for row, output in zip(found, self._engine.predict([Request(text, AdapterRef("joint", 1)) for text in texts]), strict=True):
            for label, share in output.scores.items():
                row[self._labels.index(label)] = math.log(max(share, 1e-12))
        return found


def _text(row: Example) -> str:
    return row.text


def _padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: pad_sequence([row[key] for row in rows], batch_first=True) for key in rows[0]}
